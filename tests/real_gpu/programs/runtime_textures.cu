/* SPDX-License-Identifier: Apache-2.0 */
/* Arrays, textures and surfaces: every kind of each that is remoted, sampled at places between and beyond the elements. What the
 * hardware filters is compared bit for bit. */
#include "check.cuh"
#include <cstring>
#include <vector>

static const int SAMPLES = 4096;
enum { LINE, PLANE, VOLUME, LAYERS, CUBE, ROW, GATHER };

__device__ float place(int i, unsigned salt) { return (float)((i * 2654435761u + salt * 40503u) % 10007u) / 10007.0f * 1.6f - 0.3f; }

template <typename T> __global__ void sample(cudaTextureObject_t texture, int kind, float sx, float sy, float sz, T *out)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float x = place(i, 1) * sx, y = place(i, 2) * sy, z = place(i, 3) * sz;
    switch (kind) {
    case LINE: out[i] = tex1D<T>(texture, x); break;
    case PLANE: out[i] = tex2D<T>(texture, x, y); break;
    case VOLUME: out[i] = tex3D<T>(texture, x, y, z); break;
    case LAYERS: out[i] = tex2DLayered<T>(texture, x, y, i % 5); break;
    case CUBE: out[i] = texCubemap<T>(texture, x, y, z); break;
    case ROW: out[i] = tex1Dfetch<T>(texture, (i * 37) % 1000); break;
    }
}
__global__ void gather(cudaTextureObject_t texture, float4 *out)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = tex2Dgather<float4>(texture, place(i, 1) * 60, place(i, 2) * 40, i % 4);
}
__global__ void stir(cudaSurfaceObject_t from, cudaSurfaceObject_t to, int width, int height)
{
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= width || y >= height)
        return;
    uint2 value = surf2Dread<uint2>(from, (width - 1 - x) * (int)sizeof(uint2), y);
    surf2Dwrite(make_uint2(value.y + x, value.x ^ y), to, x * (int)sizeof(uint2), height - 1 - y);
}

static cudaTextureDesc description(cudaTextureAddressMode mode, cudaTextureFilterMode filter, cudaTextureReadMode read, bool normalized)
{
    cudaTextureDesc how;
    memset(&how, 0, sizeof how);
    for (int i = 0; i < 3; i++)
        how.addressMode[i] = mode;
    how.filterMode = filter;
    how.readMode = read;
    how.normalizedCoords = normalized;
    how.borderColor[0] = 0.25f;
    return how;
}

template <typename T> static std::vector<T> numbers(size_t count)
{
    std::vector<T> found(count);
    for (size_t i = 0; i < count * sizeof(T) / 4; i++)
        ((uint32_t *)found.data())[i] = (uint32_t)(i * 2246822519u);
    return found;
}
static std::vector<float> reals(size_t count)
{
    std::vector<float> found(count);
    for (size_t i = 0; i < count; i++)
        found[i] = (float)((i * 7919) % 1009) / 64.0f - 3;
    return found;
}

template <typename T> static void look(const char *name, cudaTextureObject_t texture, int kind, float sx, float sy, float sz)
{
    T *out;
    std::vector<T> host(SAMPLES);
    CHECK(cudaMalloc(&out, SAMPLES * sizeof(T)));
    sample<T><<<SAMPLES / 256, 256>>>(texture, kind, sx, sy, sz, out);
    CHECK(cudaGetLastError());
    CHECK(cudaMemcpy(host.data(), out, SAMPLES * sizeof(T), cudaMemcpyDeviceToHost));
    equal(name, digest(host.data(), SAMPLES * sizeof(T)));
    CHECK(cudaFree(out));
}

template <typename T>
static void array_of(const char *name, int kind, cudaExtent size, unsigned flags, const T *host, const cudaTextureDesc &how)
{
    cudaArray_t array;
    cudaChannelFormatDesc form = cudaCreateChannelDesc<T>();
    CHECK(cudaMalloc3DArray(&array, &form, size, flags));
    size_t rows = size.height ? size.height : 1, slices = size.depth ? size.depth : 1;
    cudaMemcpy3DParms copy;
    memset(&copy, 0, sizeof copy);
    copy.srcPtr = make_cudaPitchedPtr((void *)host, size.width * sizeof(T), size.width, rows);
    copy.dstArray = array;
    copy.extent = make_cudaExtent(size.width, rows, slices);
    copy.kind = cudaMemcpyHostToDevice;
    CHECK(cudaMemcpy3D(&copy));
    cudaResourceDesc what;
    memset(&what, 0, sizeof what);
    what.resType = cudaResourceTypeArray;
    what.res.array.array = array;
    cudaTextureObject_t texture;
    CHECK(cudaCreateTextureObject(&texture, &what, &how, nullptr));
    bool unit = how.normalizedCoords || kind == CUBE;
    if (kind == GATHER) {
        float4 *out;
        std::vector<float4> found(SAMPLES);
        CHECK(cudaMalloc(&out, SAMPLES * sizeof(float4)));
        gather<<<SAMPLES / 256, 256>>>(texture, out);
        CHECK(cudaGetLastError());
        CHECK(cudaMemcpy(found.data(), out, SAMPLES * sizeof(float4), cudaMemcpyDeviceToHost));
        equal(name, digest(found.data(), SAMPLES * sizeof(float4)));
        CHECK(cudaFree(out));
    } else if (how.readMode == cudaReadModeNormalizedFloat) {
        look<float>(name, texture, kind, unit ? 1 : (float)size.width, unit ? 1 : (float)rows, unit ? 1 : (float)slices);
    } else {
        look<T>(name, texture, kind, unit ? 1 : (float)size.width, unit ? 1 : (float)rows, unit ? 1 : (float)slices);
    }
    /* And back, turned by what the driver makes of boxes in arrays. */
    std::vector<T> back(size.width * rows * slices);
    cudaMemcpy3DParms out;
    memset(&out, 0, sizeof out);
    out.srcArray = array;
    out.dstPtr = make_cudaPitchedPtr(back.data(), size.width * sizeof(T), size.width, rows);
    out.extent = copy.extent;
    out.kind = cudaMemcpyDeviceToHost;
    CHECK(cudaMemcpy3D(&out));
    REQUIRE(memcmp(back.data(), host, back.size() * sizeof(T)) == 0);
    CHECK(cudaDestroyTextureObject(texture));
    CHECK(cudaFreeArray(array));
}

static void textures()
{
    const std::vector<float> real = reals(64 * 64 * 64);
    const cudaTextureDesc linear = description(cudaAddressModeClamp, cudaFilterModeLinear, cudaReadModeElementType, false);
    const cudaTextureDesc wrapped = description(cudaAddressModeWrap, cudaFilterModeLinear, cudaReadModeElementType, true);
    const cudaTextureDesc mirrored = description(cudaAddressModeMirror, cudaFilterModePoint, cudaReadModeElementType, true);
    const cudaTextureDesc border = description(cudaAddressModeBorder, cudaFilterModeLinear, cudaReadModeElementType, false);
    const cudaTextureDesc point = description(cudaAddressModeClamp, cudaFilterModePoint, cudaReadModeElementType, false);
    const cudaTextureDesc scaled = description(cudaAddressModeClamp, cudaFilterModeLinear, cudaReadModeNormalizedFloat, false);
    array_of<float>("line", LINE, make_cudaExtent(777, 0, 0), 0, real.data(), linear);
    array_of<float>("plane", PLANE, make_cudaExtent(123, 77, 0), 0, real.data(), linear);
    array_of<float>("plane wrapped", PLANE, make_cudaExtent(123, 77, 0), 0, real.data(), wrapped);
    array_of<float>("plane mirrored", PLANE, make_cudaExtent(123, 77, 0), 0, real.data(), mirrored);
    array_of<float>("plane with a border", PLANE, make_cudaExtent(123, 77, 0), 0, real.data(), border);
    array_of<float>("volume", VOLUME, make_cudaExtent(31, 21, 11), 0, real.data(), linear);
    array_of<float>("layers", LAYERS, make_cudaExtent(40, 30, 5), cudaArrayLayered, real.data(), linear);
    array_of<float>("cube", CUBE, make_cudaExtent(32, 32, 6), cudaArrayCubemap, real.data(), linear);
    array_of<float>("gathered", GATHER, make_cudaExtent(60, 40, 0), cudaArrayTextureGather, real.data(), point);
    array_of<float4>("of four", PLANE, make_cudaExtent(50, 50, 0), 0, (const float4 *)real.data(), linear);
    array_of<unsigned char>("bytes as numbers", PLANE, make_cudaExtent(50, 50, 0), 0, numbers<unsigned char>(2500).data(), scaled);
    array_of<short2>("pairs", PLANE, make_cudaExtent(50, 50, 0), 0, numbers<short2>(2500).data(), point);
    array_of<uint4>("of four integers", VOLUME, make_cudaExtent(20, 10, 5), 0, numbers<uint4>(1000).data(), point);
}

static void memory()
{
    float *row, *flat;
    size_t pitch;
    const std::vector<float> real = reals(100 * 80);
    cudaResourceDesc what;
    cudaTextureObject_t texture;
    cudaTextureDesc how = description(cudaAddressModeClamp, cudaFilterModePoint, cudaReadModeElementType, false);
    CHECK(cudaMalloc(&row, 1000 * sizeof(float)));
    CHECK(cudaMemcpy(row, real.data(), 1000 * sizeof(float), cudaMemcpyHostToDevice));
    memset(&what, 0, sizeof what);
    what.resType = cudaResourceTypeLinear;
    what.res.linear.devPtr = row;
    what.res.linear.desc = cudaCreateChannelDesc<float>();
    what.res.linear.sizeInBytes = 1000 * sizeof(float);
    CHECK(cudaCreateTextureObject(&texture, &what, &how, nullptr));
    look<float>("row of memory", texture, ROW, 1, 1, 1);
    CHECK(cudaDestroyTextureObject(texture));
    CHECK(cudaMallocPitch(&flat, &pitch, 100 * sizeof(float), 80));
    CHECK(cudaMemcpy2D(flat, pitch, real.data(), 100 * sizeof(float), 100 * sizeof(float), 80, cudaMemcpyHostToDevice));
    memset(&what, 0, sizeof what);
    what.resType = cudaResourceTypePitch2D;
    what.res.pitch2D.devPtr = flat;
    what.res.pitch2D.desc = cudaCreateChannelDesc<float>();
    what.res.pitch2D.width = 100;
    what.res.pitch2D.height = 80;
    what.res.pitch2D.pitchInBytes = pitch;
    how.filterMode = cudaFilterModeLinear;
    CHECK(cudaCreateTextureObject(&texture, &what, &how, nullptr));
    look<float>("memory with a pitch", texture, PLANE, 100, 80, 1);
    CHECK(cudaDestroyTextureObject(texture));
    CHECK(cudaFree(row));
    CHECK(cudaFree(flat));
}

static void surfaces()
{
    const int width = 301, height = 203;
    const std::vector<uint2> first = numbers<uint2>(width * height);
    cudaArray_t array[2];
    cudaSurfaceObject_t surface[2];
    cudaChannelFormatDesc form = cudaCreateChannelDesc<uint2>();
    for (int i = 0; i < 2; i++) {
        CHECK(cudaMallocArray(&array[i], &form, width, height, cudaArraySurfaceLoadStore));
        cudaResourceDesc what;
        memset(&what, 0, sizeof what);
        what.resType = cudaResourceTypeArray;
        what.res.array.array = array[i];
        CHECK(cudaCreateSurfaceObject(&surface[i], &what));
    }
    CHECK(cudaMemcpy2DToArray(array[0], 0, 0, first.data(), width * sizeof(uint2), width * sizeof(uint2), height, cudaMemcpyHostToDevice));
    const dim3 block(16, 16), grid((width + 15) / 16, (height + 15) / 16);
    for (int round = 0; round < 50; round++)
        stir<<<grid, block>>>(surface[round % 2], surface[1 - round % 2], width, height);
    CHECK(cudaGetLastError());
    std::vector<uint2> last(first.size());
    CHECK(cudaMemcpy2DFromArray(last.data(), width * sizeof(uint2), array[0], 0, 0, width * sizeof(uint2), height, cudaMemcpyDeviceToHost));
    equal("surfaces", digest(last.data(), last.size() * sizeof(uint2)));
    for (int i = 0; i < 2; i++) {
        CHECK(cudaDestroySurfaceObject(surface[i]));
        CHECK(cudaFreeArray(array[i]));
    }
}

int main()
{
    textures();
    memory();
    surfaces();
    CHECK(cudaDeviceSynchronize());
    return finish();
}
