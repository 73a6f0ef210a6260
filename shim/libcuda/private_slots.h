/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The private-table slots that this product answers; private_tables.c puts them into their tables and refuses the rest.
 * Names and meanings: interoperability knowledge from open projects and black-box runs, no vendor source.
 */
#ifndef VGPU_SHIM_PRIVATE_SLOTS_H
#define VGPU_SHIM_PRIVATE_SLOTS_H

#include "private_hooks.h"

/* CUDART_INTERFACE */
VGPU_HIDDEN CUresult vgpu_cudart_load_module(CUmodule *module, const void *wrapper);
VGPU_HIDDEN CUresult vgpu_cudart_primary_context(CUcontext *context, CUdevice device);
VGPU_HIDDEN CUresult vgpu_cudart_load_module_extended(CUmodule *module, const void *wrapper, const void *variables,
                                                      const void *sizes, uint32_t count);
VGPU_HIDDEN void vgpu_cudart_module_unregistered(size_t module);
VGPU_HIDDEN CUresult vgpu_cudart_load_fatbin_extended(const void *fatbin, CUmodule *module, const void *variables,
                                                      const void *sizes, uint32_t count);
VGPU_HIDDEN CUresult vgpu_cudart_load_compilers(void);

/* TOOLS_RUNTIME_CALLBACK_HOOKS */
VGPU_HIDDEN void vgpu_hooks_api_flags(uint32_t **flags, size_t *count);
VGPU_HIDDEN void vgpu_hooks_domain_flags(uint32_t **flags, size_t *count);

/* TOOLS_TLS */
VGPU_HIDDEN CUresult vgpu_tools_thread_context(CUcontext *context);

/* CONTEXT_CHECKS */
VGPU_HIDDEN CUresult vgpu_checks_is_derived(CUcontext context, uint32_t *derived, const void **object);
VGPU_HIDDEN uint32_t vgpu_checks_at_start(void);

/* tools context, 21318c60 */
VGPU_HIDDEN CUresult vgpu_tools_context_number(CUcontext context, uint32_t *number);
VGPU_HIDDEN CUresult vgpu_tools_stream_number(CUcontext context, const void *object, uint32_t *number);
VGPU_HIDDEN CUresult vgpu_tools_stream_object(CUcontext context, CUstream stream, const void **object);

/* tools module, 6e163fbe */
typedef void (*vgpu_tools_function_visitor)(void *user, CUfunction function, uint64_t owner);
VGPU_HIDDEN uint32_t vgpu_tools_module_functions(CUcontext context, CUmodule module, vgpu_tools_function_visitor visit,
                                                 void *user);

/* topology, 1734dc26 */
VGPU_HIDDEN CUresult vgpu_topology_get(uint8_t **gpc_of_tpc, uint8_t **index_in_gpc);
VGPU_HIDDEN CUresult vgpu_topology_free(uint8_t *gpc_of_tpc, uint8_t *index_in_gpc);

#endif
