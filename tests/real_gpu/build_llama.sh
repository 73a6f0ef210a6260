#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds llama.cpp, unmodified, for one GPU generation, as the programs that tests/real_gpu and bench run:
#
#     build_llama.sh SOURCE OUTPUT [cuda|rest|all]
#
# SOURCE is an unpacked llama.cpp (for instance vendor/llama.cpp of the source distribution llama-cpp-python 0.3.36);
# OUTPUT gets llama-server, llama-bench, llama-completion and their libraries, stripped. `cuda` builds only the CUDA
# backend; `rest` needs no CUDA toolkit. nvcc, cmake and ninja are
# taken from PATH; cuBLAS's headers and library from the toolkit or else from the wheel nvidia-cublas.
set -eu
source=$1 output=$2 part=${3:-all}
build=${LLAMA_BUILD:-$output.build}
architectures=${CUDA_ARCHITECTURES:-90-real}
mkdir -p "$output"
options=(-G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_BACKEND_DL=ON -DGGML_NATIVE=OFF
    -DGGML_CPU_ALL_VARIANTS=OFF -DGGML_CCACHE=OFF -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON '-DCMAKE_INSTALL_RPATH=$ORIGIN')

find_first() { # the first existing file among the arguments
    for candidate; do [ -e "$candidate" ] && { readlink -f "$candidate"; return 0; }; done
    echo "build_llama: none of these is there: $*" >&2
    return 1
}

if [ "$part" != rest ]; then
    nvcc=$(command -v nvcc || find_first /usr/local/cuda*/bin/nvcc)
    probe=$(mktemp --suffix=.cu) # nvcc may be a wrapper; it knows itself where its toolkit is
    toolkit=$(readlink -f "$("$nvcc" --dryrun -c "$probe" 2>&1 | sed -n 's/^#\$ TOP=//p')")
    rm -f "$probe"
    wheels=$(python3 -c 'import nvidia; print(next(iter(nvidia.__path__)))' 2>/dev/null || echo /nonexistent)
    header=$(find_first "$toolkit"/include/cublas_v2.h "$toolkit"/targets/x86_64-linux/include/cublas_v2.h \
        /usr/local/cuda*/include/cublas_v2.h /usr/include/cublas_v2.h "$wheels"/*/include/cublas_v2.h)
    cublas=$(find_first "$toolkit"/lib64/libcublas.so "$toolkit"/targets/x86_64-linux/lib/libcublas.so \
        "$toolkit"/lib64/libcublas.so.13 "$wheels"/*/lib/libcublas.so.1[0-9])
    driver=$(find_first ${LIBCUDA:-} "$toolkit"/lib64/stubs/libcuda.so "$toolkit"/targets/x86_64-linux/lib/stubs/libcuda.so \
        /usr/lib/x86_64-linux-gnu/libcuda.so.1 /usr/local/nvidia/lib64/libcuda.so.1 \
        "$(ldconfig -p | sed -n 's/.*libcuda\.so\.1 .*=> //p' | head -1)")
    cudart=$(find_first "$toolkit"/lib64/libcudart.so "$toolkit"/targets/x86_64-linux/lib/libcudart.so \
        "$toolkit"/lib/libcudart.so.13 "$wheels"/*/lib/libcudart.so.1[0-9])
    echo "build_llama: nvcc $nvcc, header $header, libraries $cublas $cudart $driver"
    cuda_options=("${options[@]}" -DGGML_CUDA=ON -DCMAKE_CUDA_COMPILER="$nvcc" -DCMAKE_CUDA_ARCHITECTURES="$architectures"
        -DGGML_CUDA_GRAPHS=ON -DGGML_CUDA_FA="${GGML_CUDA_FA:-ON}" -DGGML_CUDA_FA_ALL_QUANTS=OFF -DGGML_CUDA_NCCL=OFF
        -DCUDA_cublas_LIBRARY="$cublas" -DCUDA_cuda_driver_LIBRARY="$driver" -DCUDA_CUDART="$cudart"
        -DCMAKE_CUDA_FLAGS="-I$(dirname "$header")")
    cmake -S "$source" -B "$build/cuda" -DGGML_CPU=OFF -DLLAMA_BUILD_{COMMON,TESTS,TOOLS,EXAMPLES,SERVER,APP}=OFF \
        "${cuda_options[@]}" >"$output/configure-cuda.log" 2>&1 || { tail -20 "$output/configure-cuda.log"; exit 1; }
    ninja -C "$build/cuda" ${JOBS:+-j$JOBS} ggml-cuda >"$output/build-cuda.log" 2>&1 ||
        { grep -m5 -A5 -E 'error|FAILED' "$output/build-cuda.log"; tail -2 "$output/build-cuda.log"; exit 1; }
    cp "$(find "$build/cuda" -name libggml-cuda.so)" "$output/"
fi
if [ "$part" != cuda ]; then
    cmake -S "$source" -B "$build/rest" "${options[@]}" -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF >"$output/configure-rest.log" 2>&1 ||
        { tail -20 "$output/configure-rest.log"; exit 1; }
    ninja -C "$build/rest" ${JOBS:+-j$JOBS} llama-server llama-bench llama-completion ggml-cpu >"$output/build-rest.log" 2>&1 ||
        { tail -20 "$output/build-rest.log"; exit 1; }
    cp -P "$build"/rest/bin/* "$output/"
fi
find "$output" -type f \( -name '*.so*' -o -name 'llama-*' \) -exec strip --strip-unneeded {} +
ls -l "$output"
