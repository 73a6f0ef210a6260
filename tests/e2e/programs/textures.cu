// SPDX-License-Identifier: Apache-2.0
// Textures and surfaces of the runtime, compared with what the host computes: arrays of every dimension and in layers, device
// memory in a row and in rows, both filters, every addressing mode, numbers made of integers.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call)                                                                                            \
    do {                                                                                                       \
        cudaError_t status_ = (call);                                                                          \
        if (status_ != cudaSuccess) {                                                                          \
            printf("%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(status_));                            \
            exit(1);                                                                                           \
        }                                                                                                      \
    } while (0)
#define EXPECT(condition)                                                                                      \
    do {                                                                                                       \
        if (!(condition)) {                                                                                    \
            printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                                     \
            exit(1);                                                                                           \
        }                                                                                                      \
    } while (0)

enum { W = 13, H = 7, D = 5, N = 400 };

__global__ void at_1d(cudaTextureObject_t texture, const float *x, float *out) { out[threadIdx.x] = tex1D<float>(texture, x[threadIdx.x]); }
__global__ void at_2d(cudaTextureObject_t texture, const float *x, const float *y, float *out)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < N) out[i] = tex2D<float>(texture, x[i], y[i]);
}
__global__ void at_3d(cudaTextureObject_t texture, float *out)
{
    const int x = threadIdx.x, y = blockIdx.x, z = blockIdx.y;
    out[(z * H + y) * W + x] = tex3D<float>(texture, x + 0.5f, y + 0.5f, z + 0.5f);
}
__global__ void in_layers(cudaTextureObject_t flat, cudaTextureObject_t row, float *out)
{
    const int x = threadIdx.x, y = blockIdx.x, layer = blockIdx.y;
    out[(layer * H + y) * W + x] = tex2DLayered<float>(flat, x + 0.5f, y + 0.5f, layer) + 1000 * tex1DLayered<float>(row, x + 0.5f, layer);
}
__global__ void colours(cudaTextureObject_t as_numbers, cudaTextureObject_t as_integers, float4 *numbers, uchar4 *integers)
{
    const int i = blockIdx.x * W + threadIdx.x;
    numbers[i] = tex2D<float4>(as_numbers, threadIdx.x + 0.5f, blockIdx.x + 0.5f);
    integers[i] = tex2D<uchar4>(as_integers, threadIdx.x + 0.5f, blockIdx.x + 0.5f);
}
__global__ void from_row(cudaTextureObject_t texture, const int *index, int2 *out, int count)
{
    const int i = threadIdx.x;
    if (i < count) out[i] = tex1Dfetch<int2>(texture, index[i]);
}
__global__ void turn(cudaSurfaceObject_t from, cudaSurfaceObject_t to)
{
    const int x = threadIdx.x, y = blockIdx.x;
    const float2 value = surf2Dread<float2>(from, x * (int)sizeof(float2), y);
    surf2Dwrite(make_float2(value.y, -value.x), to, (W - 1 - x) * (int)sizeof(float2), y);
    if (x == 0) surf2Dwrite(value, to, W * (int)sizeof(float2), y, cudaBoundaryModeZero); // nowhere
}
__global__ void edges(cudaSurfaceObject_t surface, float2 *out)
{
    out[0] = surf2Dread<float2>(surface, -(int)sizeof(float2), 2, cudaBoundaryModeZero);
    out[1] = surf2Dread<float2>(surface, 1000 * (int)sizeof(float2), -3, cudaBoundaryModeClamp);
}
__global__ void boxes(cudaSurfaceObject_t surface)
{
    const int x = threadIdx.x, y = blockIdx.x, z = blockIdx.y;
    short value;
    surf3Dread(&value, surface, x * 2, y, z);
    surf3Dwrite((short)(value * 3 + z), surface, x * 2, y, z);
}

template <class T> static T *upload(const std::vector<T> &values)
{
    T *memory;
    CHECK(cudaMalloc(&memory, values.size() * sizeof(T)));
    CHECK(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return memory;
}
template <class T> static std::vector<T> download(const T *memory, size_t count)
{
    std::vector<T> values(count);
    CHECK(cudaGetLastError());
    CHECK(cudaMemcpy(values.data(), memory, count * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
}
static cudaResourceDesc of(cudaArray_t array)
{
    cudaResourceDesc resource = {};
    resource.resType = cudaResourceTypeArray;
    resource.res.array.array = array;
    return resource;
}
static cudaTextureObject_t texture_of(const cudaResourceDesc &resource, cudaTextureAddressMode mode = cudaAddressModeClamp,
                                      cudaTextureFilterMode filter = cudaFilterModePoint, bool normalized = false,
                                      cudaTextureReadMode read = cudaReadModeElementType)
{
    cudaTextureDesc how = {};
    how.addressMode[0] = how.addressMode[1] = how.addressMode[2] = mode;
    how.filterMode = filter;
    how.normalizedCoords = normalized;
    how.readMode = read;
    how.borderColor[0] = -5;
    cudaTextureObject_t texture;
    CHECK(cudaCreateTextureObject(&texture, &resource, &how, NULL));
    return texture;
}

static std::vector<float> field(size_t count)
{
    std::vector<float> values(count);
    for (size_t i = 0; i < count; i++)
        values[i] = (float)(i * 37 % 101) / 4;
    return values;
}

// The texel that a mode finds for a number, or -1 for the border.
static int place(int index, int size, cudaTextureAddressMode mode)
{
    const int wrapped = (index % (2 * size) + 2 * size) % (2 * size);
    switch (mode) {
    case cudaAddressModeWrap: return wrapped % size;
    case cudaAddressModeMirror: return wrapped < size ? wrapped : 2 * size - 1 - wrapped;
    case cudaAddressModeBorder: return index >= 0 && index < size ? index : -1;
    default: return index < 0 ? 0 : index >= size ? size - 1 : index;
    }
}

static void modes(void)
{
    const std::vector<float> values = field(W * H);
    const cudaChannelFormatDesc channel = cudaCreateChannelDesc<float>();
    cudaArray_t array;
    CHECK(cudaMallocArray(&array, &channel, W, H));
    CHECK(cudaMemcpy2DToArray(array, 0, 0, values.data(), W * 4, W * 4, H, cudaMemcpyHostToDevice));
    std::vector<float> x(N), y(N);
    for (int i = 0; i < N; i++) { // away from the borders between texels, and exact in steps of a 256th
        x[i] = (i * 29 % (4 * W * 16) - 24 * W + 0.5f) / 16;
        y[i] = (i * 53 % (4 * H * 16) - 24 * H + 0.5f) / 16;
    }
    float *at_x = upload(x), *at_y = upload(y), *out = upload(x);
    for (int normalized = 0; normalized < 2; normalized++) {
        for (int m = 0; m < 4; m++) {
            const cudaTextureAddressMode mode = (cudaTextureAddressMode)m;
            if (!normalized && (mode == cudaAddressModeWrap || mode == cudaAddressModeMirror)) continue;
            if (normalized) {
                std::vector<float> nx(N), ny(N);
                for (int i = 0; i < N; i++) nx[i] = x[i] / W, ny[i] = y[i] / H;
                CHECK(cudaMemcpy(at_x, nx.data(), N * 4, cudaMemcpyHostToDevice));
                CHECK(cudaMemcpy(at_y, ny.data(), N * 4, cudaMemcpyHostToDevice));
            }
            for (int linear = 0; linear < 2; linear++) {
                cudaTextureObject_t texture = texture_of(of(array), mode, linear ? cudaFilterModeLinear : cudaFilterModePoint, normalized);
                at_2d<<<(N + 63) / 64, 64>>>(texture, at_x, at_y, out);
                const std::vector<float> got = download(out, N);
                for (int i = 0; i < N; i++) {
                    const auto texel = [&](int column, int row) {
                        const int px = place(column, W, mode), py = place(row, H, mode);
                        return px < 0 || py < 0 ? -5.0 : (double)values[py * W + px];
                    };
                    double expected;
                    if (linear) {
                        const double bx = x[i] - 0.5, by = y[i] - 0.5, fx = floor(bx), fy = floor(by), a = bx - fx, b = by - fy;
                        expected = (1 - a) * (1 - b) * texel((int)fx, (int)fy) + a * (1 - b) * texel((int)fx + 1, (int)fy) +
                                   (1 - a) * b * texel((int)fx, (int)fy + 1) + a * b * texel((int)fx + 1, (int)fy + 1);
                    } else {
                        expected = texel((int)floor(x[i]), (int)floor(y[i]));
                    }
                    EXPECT(fabs(got[i] - expected) <= (linear ? 0.25 : 0)); /* fractions have eight bits, and values reach 30 */
                }
                CHECK(cudaDestroyTextureObject(texture));
            }
        }
    }
    CHECK(cudaFreeArray(array));
    puts("modes and filters");
}

static void dimensions(void)
{
    const std::vector<float> values = field(W * H * D);
    const cudaChannelFormatDesc channel = cudaCreateChannelDesc<float>();
    cudaArray_t box, layers, lines, line;
    CHECK(cudaMalloc3DArray(&box, &channel, make_cudaExtent(W, H, D)));
    CHECK(cudaMalloc3DArray(&layers, &channel, make_cudaExtent(W, H, D), cudaArrayLayered));
    CHECK(cudaMalloc3DArray(&lines, &channel, make_cudaExtent(W, 0, D), cudaArrayLayered));
    CHECK(cudaMallocArray(&line, &channel, W));
    cudaMemcpy3DParms copy = {};
    copy.srcPtr = make_cudaPitchedPtr((void *)values.data(), W * 4, W, H);
    copy.extent = make_cudaExtent(W, H, D);
    copy.kind = cudaMemcpyHostToDevice;
    copy.dstArray = box;
    CHECK(cudaMemcpy3D(&copy));
    copy.dstArray = layers;
    CHECK(cudaMemcpy3D(&copy));
    copy.dstArray = lines;
    copy.extent.height = 1;
    CHECK(cudaMemcpy3D(&copy));
    CHECK(cudaMemcpy2DToArray(line, 0, 0, values.data(), W * 4, W * 4, 1, cudaMemcpyHostToDevice));
    float *out;
    CHECK(cudaMalloc(&out, W * H * D * 4));
    cudaTextureObject_t texture = texture_of(of(box));
    at_3d<<<dim3(H, D), W>>>(texture, out);
    EXPECT(download(out, W * H * D) == values);
    CHECK(cudaDestroyTextureObject(texture));
    cudaTextureObject_t flat = texture_of(of(layers)), row = texture_of(of(lines));
    in_layers<<<dim3(H, D), W>>>(flat, row, out);
    const std::vector<float> both = download(out, W * H * D);
    for (int i = 0; i < W * H * D; i++)
        EXPECT(both[i] == values[i] + 1000 * values[i / (W * H) * W * H + i % W]);
    CHECK(cudaDestroyTextureObject(flat));
    CHECK(cudaDestroyTextureObject(row));
    std::vector<float> x(W);
    for (int i = 0; i < W; i++) x[i] = W - i - 0.25f;
    texture = texture_of(of(line));
    at_1d<<<1, W>>>(texture, upload(x), out);
    const std::vector<float> got = download(out, W);
    for (int i = 0; i < W; i++)
        EXPECT(got[i] == values[W - 1 - i]);
    CHECK(cudaDestroyTextureObject(texture));
    for (cudaArray_t array : {box, layers, lines, line})
        CHECK(cudaFreeArray(array));
    puts("dimensions and layers");
}

static void formats(void)
{
    std::vector<uchar4> values(W * H);
    for (int i = 0; i < W * H; i++)
        values[i] = make_uchar4(i, 3 * i, 255 - i, 7 * i);
    const cudaChannelFormatDesc channel = cudaCreateChannelDesc<uchar4>();
    cudaArray_t array;
    CHECK(cudaMallocArray(&array, &channel, W, H));
    CHECK(cudaMemcpy2DToArray(array, 0, 0, values.data(), W * 4, W * 4, H, cudaMemcpyHostToDevice));
    float4 *numbers;
    uchar4 *integers;
    CHECK(cudaMalloc(&numbers, W * H * sizeof *numbers));
    CHECK(cudaMalloc(&integers, W * H * sizeof *integers));
    cudaTextureObject_t as_numbers = texture_of(of(array), cudaAddressModeClamp, cudaFilterModePoint, false, cudaReadModeNormalizedFloat);
    cudaTextureObject_t as_integers = texture_of(of(array));
    colours<<<H, W>>>(as_numbers, as_integers, numbers, integers);
    const std::vector<float4> got = download(numbers, W * H);
    const std::vector<uchar4> same = download(integers, W * H);
    for (int i = 0; i < W * H; i++) {
        EXPECT(fabs(got[i].x - values[i].x / 255.0) < 1e-6 && fabs(got[i].y - values[i].y / 255.0) < 1e-6);
        EXPECT(fabs(got[i].z - values[i].z / 255.0) < 1e-6 && fabs(got[i].w - values[i].w / 255.0) < 1e-6);
        EXPECT(same[i].x == values[i].x && same[i].y == values[i].y && same[i].z == values[i].z && same[i].w == values[i].w);
    }
    CHECK(cudaDestroyTextureObject(as_numbers));
    CHECK(cudaDestroyTextureObject(as_integers));
    CHECK(cudaFreeArray(array));
    puts("formats");
}

static void memory(void)
{
    std::vector<int2> values(1000);
    for (int i = 0; i < 1000; i++)
        values[i] = make_int2(i * i, -i);
    cudaResourceDesc row = {};
    row.resType = cudaResourceTypeLinear;
    row.res.linear.devPtr = upload(values);
    row.res.linear.desc = cudaCreateChannelDesc<int2>();
    row.res.linear.sizeInBytes = values.size() * sizeof(int2);
    std::vector<int> index(100);
    for (int i = 0; i < 100; i++)
        index[i] = i * 371 % 1000;
    int2 *out;
    CHECK(cudaMalloc(&out, 100 * sizeof *out));
    cudaTextureObject_t texture = texture_of(row);
    cudaResourceDesc said;
    CHECK(cudaGetTextureObjectResourceDesc(&said, texture));
    EXPECT(said.resType == cudaResourceTypeLinear && said.res.linear.devPtr == row.res.linear.devPtr && said.res.linear.sizeInBytes == 8000);
    from_row<<<1, 128>>>(texture, upload(index), out, 100);
    const std::vector<int2> got = download(out, 100);
    for (int i = 0; i < 100; i++)
        EXPECT(got[i].x == index[i] * index[i] && got[i].y == -index[i]);
    CHECK(cudaDestroyTextureObject(texture));

    const std::vector<float> flat = field(W * H);
    size_t pitch;
    void *rows;
    CHECK(cudaMallocPitch(&rows, &pitch, W * 4, H));
    CHECK(cudaMemcpy2D(rows, pitch, flat.data(), W * 4, W * 4, H, cudaMemcpyHostToDevice));
    cudaResourceDesc pitched = {};
    pitched.resType = cudaResourceTypePitch2D;
    pitched.res.pitch2D.devPtr = rows;
    pitched.res.pitch2D.desc = cudaCreateChannelDesc<float>();
    pitched.res.pitch2D.width = W;
    pitched.res.pitch2D.height = H;
    pitched.res.pitch2D.pitchInBytes = pitch;
    std::vector<float> x(N), y(N);
    for (int i = 0; i < N; i++)
        x[i] = i % W + 0.5f, y[i] = i / W % H + 0.5f;
    float *results;
    CHECK(cudaMalloc(&results, N * 4));
    texture = texture_of(pitched, cudaAddressModeClamp, cudaFilterModeLinear);
    at_2d<<<(N + 63) / 64, 64>>>(texture, upload(x), upload(y), results);
    const std::vector<float> texels = download(results, N);
    for (int i = 0; i < N; i++)
        EXPECT(texels[i] == flat[i % (W * H)]);
    CHECK(cudaDestroyTextureObject(texture));
    puts("device memory");
}

static cudaSurfaceObject_t surface_of(cudaArray_t array)
{
    const cudaResourceDesc resource = of(array);
    cudaSurfaceObject_t surface;
    CHECK(cudaCreateSurfaceObject(&surface, &resource));
    return surface;
}

static void surfaces(void)
{
    std::vector<float2> values(W * H), back(W * H);
    for (int i = 0; i < W * H; i++)
        values[i] = make_float2(i, i / 8.0f);
    const cudaChannelFormatDesc channel = cudaCreateChannelDesc<float2>();
    cudaArray_t from, to;
    CHECK(cudaMallocArray(&from, &channel, W, H, cudaArraySurfaceLoadStore));
    CHECK(cudaMallocArray(&to, &channel, W, H, cudaArraySurfaceLoadStore));
    CHECK(cudaMemcpy2DToArray(from, 0, 0, values.data(), W * 8, W * 8, H, cudaMemcpyHostToDevice));
    cudaSurfaceObject_t source = surface_of(from), target = surface_of(to);
    turn<<<H, W>>>(source, target);
    CHECK(cudaGetLastError());
    CHECK(cudaMemcpy2DFromArray(back.data(), W * 8, to, 0, 0, W * 8, H, cudaMemcpyDeviceToHost));
    for (int y = 0; y < H; y++)
        for (int x = 0; x < W; x++)
            EXPECT(back[y * W + W - 1 - x].x == values[y * W + x].y && back[y * W + W - 1 - x].y == -values[y * W + x].x);
    float2 *out;
    CHECK(cudaMalloc(&out, 2 * sizeof *out));
    edges<<<1, 1>>>(source, out);
    const std::vector<float2> got = download(out, 2);
    EXPECT(got[0].x == 0 && got[0].y == 0 && got[1].x == values[W - 1].x && got[1].y == values[W - 1].y);
    CHECK(cudaDestroySurfaceObject(source));
    CHECK(cudaDestroySurfaceObject(target));
    CHECK(cudaFreeArray(from));
    CHECK(cudaFreeArray(to));

    std::vector<short> numbers(W * H * D), changed(W * H * D);
    for (int i = 0; i < W * H * D; i++)
        numbers[i] = (short)(i - 200);
    const cudaChannelFormatDesc whole = cudaCreateChannelDesc<short>();
    cudaArray_t box;
    CHECK(cudaMalloc3DArray(&box, &whole, make_cudaExtent(W, H, D), cudaArraySurfaceLoadStore));
    cudaMemcpy3DParms copy = {};
    copy.srcPtr = make_cudaPitchedPtr(numbers.data(), W * 2, W, H);
    copy.dstArray = box;
    copy.extent = make_cudaExtent(W, H, D);
    copy.kind = cudaMemcpyHostToDevice;
    CHECK(cudaMemcpy3D(&copy));
    cudaSurfaceObject_t surface = surface_of(box);
    boxes<<<dim3(H, D), W>>>(surface);
    CHECK(cudaGetLastError());
    cudaMemcpy3DParms out_of = {};
    out_of.srcArray = box;
    out_of.dstPtr = make_cudaPitchedPtr(changed.data(), W * 2, W, H);
    out_of.extent = copy.extent;
    out_of.kind = cudaMemcpyDeviceToHost;
    CHECK(cudaMemcpy3D(&out_of));
    for (int i = 0; i < W * H * D; i++)
        EXPECT(changed[i] == (short)(numbers[i] * 3 + i / (W * H)));
    CHECK(cudaDestroySurfaceObject(surface));
    CHECK(cudaFreeArray(box));
    puts("surfaces");
}

int main()
{
    modes();
    dimensions();
    formats();
    memory();
    surfaces();
    CHECK(cudaDeviceSynchronize());
    puts("done");
    return 0;
}
