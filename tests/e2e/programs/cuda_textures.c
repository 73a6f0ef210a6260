/* SPDX-License-Identifier: Apache-2.0 */
/* Texture and surface objects as the driver's interface has them: descriptions, errors, the end of a context. What kernels see
 * is in textures.cu. */
#include "guest.h"

static CUarray make(size_t width, size_t height, size_t depth, unsigned flags)
{
    CUDA_ARRAY3D_DESCRIPTOR asked = {width, height, depth, CU_AD_FORMAT_FLOAT, 1, flags};
    CUarray array = NULL;
    CHECK(cuArray3DCreate(&array, &asked));
    return array;
}

static CUDA_RESOURCE_DESC of(CUarray array)
{
    CUDA_RESOURCE_DESC resource;
    memset(&resource, 0, sizeof resource);
    resource.resType = CU_RESOURCE_TYPE_ARRAY;
    resource.res.array.hArray = array;
    return resource;
}

static const CUDA_TEXTURE_DESC plain = {.addressMode = {CU_TR_ADDRESS_MODE_CLAMP, CU_TR_ADDRESS_MODE_BORDER, CU_TR_ADDRESS_MODE_CLAMP},
                                        .filterMode = CU_TR_FILTER_MODE_LINEAR, .maxAnisotropy = 3, .borderColor = {1, 2, 3, 4}};

static void descriptions(void)
{
    CUarray array = make(16, 8, 4, CUDA_ARRAY3D_LAYERED);
    CUDA_RESOURCE_DESC resource = of(array), said;
    CUDA_TEXTURE_DESC how;
    CUDA_RESOURCE_VIEW_DESC view = {.format = CU_RES_VIEW_FORMAT_UINT_1X32, .width = 16, .height = 8, .depth = 4, .firstLayer = 1, .lastLayer = 2}, seen;
    CUtexObject texture, viewed;
    CHECK(cuTexObjectCreate(&texture, &resource, &plain, NULL));
    CUDA_TEXTURE_DESC integers = plain;
    integers.filterMode = CU_TR_FILTER_MODE_POINT;
    CHECK(cuTexObjectCreate(&viewed, &resource, &integers, &view));
    EXPECT(viewed != texture);
    CHECK(cuTexObjectGetResourceDesc(&said, texture));
    EXPECT(said.resType == CU_RESOURCE_TYPE_ARRAY && said.res.array.hArray == array && said.flags == 0);
    CHECK(cuTexObjectGetTextureDesc(&how, texture));
    EXPECT(memcmp(&how, &plain, sizeof how) == 0);
    EXPECT(cuTexObjectGetResourceViewDesc(&seen, texture) == CUDA_ERROR_INVALID_VALUE);
    CHECK(cuTexObjectGetResourceViewDesc(&seen, viewed));
    EXPECT(memcmp(&seen, &view, sizeof seen) == 0);
    EXPECT(cuTexObjectGetResourceDesc(NULL, texture) == CUDA_ERROR_INVALID_VALUE);
    CHECK(cuTexObjectDestroy(texture));
    EXPECT(cuTexObjectDestroy(texture) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuTexObjectGetTextureDesc(&how, texture) == CUDA_ERROR_INVALID_VALUE);
    CHECK(cuTexObjectDestroy(viewed));
    CHECK(cuArrayDestroy(array));

    CUarray written = make(16, 8, 0, CUDA_ARRAY3D_SURFACE_LDST);
    CUsurfObject surface;
    resource = of(written);
    CHECK(cuSurfObjectCreate(&surface, &resource));
    CHECK(cuSurfObjectGetResourceDesc(&said, surface));
    EXPECT(said.resType == CU_RESOURCE_TYPE_ARRAY && said.res.array.hArray == written);
    EXPECT(cuTexObjectDestroy(surface) == CUDA_ERROR_INVALID_VALUE);
    CHECK(cuSurfObjectDestroy(surface));
    EXPECT(cuSurfObjectDestroy(surface) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuSurfObjectGetResourceDesc(&said, surface) == CUDA_ERROR_INVALID_VALUE);
    CHECK(cuArrayDestroy(written));
}

static void errors(void)
{
    CUarray array = make(16, 8, 0, 0);
    CUDA_RESOURCE_DESC good = of(array), wrong;
    CUDA_RESOURCE_VIEW_DESC view = {.format = CU_RES_VIEW_FORMAT_NONE, .width = 64};
    CUtexObject texture;
    CUsurfObject surface;
    CUdeviceptr memory;
    CHECK(cuMemAlloc(&memory, 4096));
    EXPECT(cuTexObjectCreate(NULL, &good, &plain, NULL) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuTexObjectCreate(&texture, NULL, &plain, NULL) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuTexObjectCreate(&texture, &good, NULL, NULL) == CUDA_ERROR_INVALID_VALUE);
    wrong = of(NULL);
    EXPECT(cuTexObjectCreate(&texture, &wrong, &plain, NULL) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuSurfObjectCreate(NULL, &good) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuSurfObjectCreate(&surface, NULL) == CUDA_ERROR_INVALID_VALUE);
    wrong = good;
    wrong.flags = 1;
    EXPECT(cuTexObjectCreate(&texture, &wrong, &plain, NULL) == CUDA_ERROR_INVALID_VALUE);
    wrong = good;
    wrong.resType = CU_RESOURCE_TYPE_MIPMAPPED_ARRAY;
    EXPECT(cuTexObjectCreate(&texture, &wrong, &plain, NULL) == CUDA_ERROR_NOT_SUPPORTED);
    wrong.resType = (CUresourcetype)9;
    EXPECT(cuTexObjectCreate(&texture, &wrong, &plain, NULL) == CUDA_ERROR_INVALID_VALUE);
    memset(&wrong, 0, sizeof wrong);
    wrong.resType = CU_RESOURCE_TYPE_LINEAR;
    wrong.res.linear.devPtr = memory;
    wrong.res.linear.format = CU_AD_FORMAT_FLOAT;
    wrong.res.linear.numChannels = 1;
    wrong.res.linear.sizeInBytes = 4096;
    CHECK(cuTexObjectCreate(&texture, &wrong, &plain, &view)); /* documented for arrays; the driver takes it */
    CHECK(cuTexObjectDestroy(texture));
    EXPECT(cuSurfObjectCreate(&surface, &wrong) == CUDA_ERROR_INVALID_VALUE);
    CHECK(cuTexObjectCreate(&texture, &wrong, &plain, NULL));
    CHECK(cuTexObjectDestroy(texture));
    wrong.res.linear.numChannels = 3;
    EXPECT(cuTexObjectCreate(&texture, &wrong, &plain, NULL) == CUDA_ERROR_INVALID_VALUE);
    CHECK(cuArrayDestroy(array));
    EXPECT(cuTexObjectCreate(&texture, &good, &plain, NULL) == CUDA_ERROR_INVALID_HANDLE);
    EXPECT(cuSurfObjectCreate(&surface, &good) == CUDA_ERROR_INVALID_HANDLE);
    CHECK(cuMemFree(memory));
}

static void ends(void)
{
    CUdevice device;
    CUcontext context;
    CUtexObject texture;
    CUDA_RESOURCE_DESC said;
    CHECK(cuCtxGetDevice(&device));
    CHECK(cuCtxCreate(&context, NULL, 0, device));
    CUDA_RESOURCE_DESC resource = of(make(16, 8, 0, 0));
    CHECK(cuTexObjectCreate(&texture, &resource, &plain, NULL));
    CHECK(cuTexObjectGetResourceDesc(&said, texture));
    CHECK(cuCtxDestroy(context));
    EXPECT(cuTexObjectGetResourceDesc(&said, texture) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuTexObjectDestroy(texture) == CUDA_ERROR_INVALID_VALUE);
}

/* More than a bucket's worth, given back in another order. */
static void many(void)
{
    enum { COUNT = 3000 };
    static CUtexObject texture[COUNT];
    CUarray array = make(16, 8, 0, 0);
    CUDA_RESOURCE_DESC resource = of(array);
    CUDA_TEXTURE_DESC how = plain, said;
    for (int i = 0; i < COUNT; i++) {
        how.borderColor[0] = (float)i;
        CHECK(cuTexObjectCreate(&texture[i], &resource, &how, NULL));
    }
    for (int i = 0; i < COUNT; i++) {
        const int at = i * 7 % COUNT;
        CHECK(cuTexObjectGetTextureDesc(&said, texture[at]));
        EXPECT(said.borderColor[0] == (float)at);
        CHECK(cuTexObjectDestroy(texture[at]));
    }
    CHECK(cuArrayDestroy(array));
}

int main(void)
{
    start();
    descriptions();
    errors();
    ends();
    many();
    puts("done");
    return 0;
}
