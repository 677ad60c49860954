// Between the matrix products of a pass: one kernel each. Compiled at run time with these defined:
//   T      what states are: float, or unsigned short (the bits of a bfloat16)
//   PARTS  3: what is made goes out as high, low and high part, each bfloat16 (split.py); 1: as one bfloat16
//   EACH, WIDTH, THREADS  of `attend`: queries that share a key, the width of a head, the threads of a block
// A row that is made has `wide` numbers: PARTS times its width, then ones, by which a bias is multiplied. Widths are
// multiples of 4, and rows begin at multiples of 16 bytes.

typedef unsigned short half_t;

__device__ __forceinline__ float wider(float x) { return x; }
__device__ __forceinline__ float wider(half_t x) { return __uint_as_float((unsigned int)x << 16); }

__device__ __forceinline__ float4 four(const float* x) { return *(const float4*)x; }
__device__ __forceinline__ float4 four(const half_t* x) {
    ushort4 bits = *(const ushort4*)x;
    return make_float4(wider(bits.x), wider(bits.y), wider(bits.z), wider(bits.w));
}

// To the nearest, ties to even, as torch rounds.
__device__ __forceinline__ half_t rounded(float x) {
    unsigned int bits = __float_as_uint(x);
    return x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(half_t* to, float x) { *to = rounded(x); }

// Four columns of a row, and the ones behind the last, by whoever has the first.
__device__ __forceinline__ void put(half_t* row, int column, int width, int wide, float4 x) {
    ushort4 high = make_ushort4(rounded(x.x), rounded(x.y), rounded(x.z), rounded(x.w));
    *(ushort4*)(row + column) = high;
    if (PARTS == 3) {
        *(ushort4*)(row + column + width) =
            make_ushort4(rounded(x.x - wider(high.x)), rounded(x.y - wider(high.y)),
                         rounded(x.z - wider(high.z)), rounded(x.w - wider(high.w)));
        *(ushort4*)(row + column + 2 * width) = high;
    }
    if (column == 0) {
        for (int at = PARTS * width; at < wide; ++at) row[at] = 0x3f80;
    }
}

__device__ __forceinline__ float gelu(float x) {
    return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// Each column by itself. made: 0 as it is, 1 its gelu (tanh), 2 the silu of the first half times the second.
extern "C" __global__ void columns(const T* x, half_t* to, int rows, int stride, int width, int wide, int made) {
    int at = blockIdx.x * blockDim.x + threadIdx.x, row = at / (width / 4), column = 4 * (at % (width / 4));
    if (row >= rows) return;
    const T* own = x + (long long)row * stride + column;
    float4 value = four(own);
    if (made == 1) {
        value = make_float4(gelu(value.x), gelu(value.y), gelu(value.z), gelu(value.w));
    } else if (made == 2) {
        float4 by = four(own + width);
        value = make_float4(silu(value.x) * by.x, silu(value.y) * by.y, silu(value.z) * by.z, silu(value.w) * by.w);
    }
    put(to + (long long)row * wide, column, width, wide, value);
}

__device__ __forceinline__ void store4(float* to, float4 x) { *(float4*)to = x; }
__device__ __forceinline__ void store4(half_t* to, float4 x) {
    *(ushort4*)to = make_ushort4(rounded(x.x), rounded(x.y), rounded(x.z), rounded(x.w));
}

// silu(gate) up of `count` numbers.
extern "C" __global__ void gates(const T* gate, const T* up, T* to, int count) {
    int at = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (at >= count) return;
    float4 g = four(gate + at), u = four(up + at);
    store4(to + at, make_float4(silu(g.x) * u.x, silu(g.y) * u.y, silu(g.z) * u.z, silu(g.w) * u.w));
}

// One number's part of its gradient: slope times up times silu'(gate) goes out, and slope times silu(gate) into `up`.
__device__ __forceinline__ float gate_slope(float gate, float& up, float slope) {
    float share = 1.0f / (1.0f + expf(-gate)), of_gate = slope * up * share * (1.0f + gate * (1.0f - share));
    up = slope * gate * share;
    return of_gate;
}

extern "C" __global__ void gate_slopes(const T* gate, const T* up, const T* slope, T* of_gate, T* of_up, int count) {
    int at = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (at >= count) return;
    float4 g = four(gate + at), u = four(up + at), s = four(slope + at);
    g.x = gate_slope(g.x, u.x, s.x), g.y = gate_slope(g.y, u.y, s.y);
    g.z = gate_slope(g.z, u.z, s.z), g.w = gate_slope(g.w, u.w, s.w);
    store4(of_gate + at, g);
    store4(of_up + at, u);
}

__device__ float summed(float x, float* shared) {
    for (int apart = 16; apart; apart >>= 1) x += __shfl_xor_sync(~0u, x, apart);
    __syncthreads();  // the last sum has been read
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int warp = 0; warp < blockDim.x / 32; ++warp) x += shared[warp];
    return x;
}

__device__ __forceinline__ float highest_of(float x, float* shared) {
    for (int apart = 16; apart; apart >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, apart));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    for (int warp = 0; warp < blockDim.x / 32; ++warp) x = fmaxf(x, shared[warp]);
    return x;
}

// The norm of rows that lie one behind the other: LayerNorm where it is `centred`, with a bias, else RMSNorm.
// Grid (rows).
extern "C" __global__ void norms(const T* x, const T* weight, const T* bias, half_t* to, int width, int wide,
                                 int centred, double epsilon) {
    __shared__ float shared[32];
    const T* own = x + (long long)blockIdx.x * width;
    const int first = 4 * threadIdx.x, next = 4 * blockDim.x;
    float mean = 0, sum = 0;
    if (centred) {
        for (int i = first; i < width; i += next) {
            float4 v = four(own + i);
            sum += v.x + v.y + v.z + v.w;
        }
        mean = summed(sum, shared) / width;
        sum = 0;
    }
    for (int i = first; i < width; i += next) {
        float4 v = four(own + i);
        v.x -= mean, v.y -= mean, v.z -= mean, v.w -= mean;
        sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    float scale = 1.0f / sqrtf(summed(sum, shared) / width + (float)epsilon);
    for (int i = first; i < width; i += next) {
        float4 v = four(own + i), by = four(weight + i), more = make_float4(0, 0, 0, 0);
        if (centred) more = four(bias + i);
        v.x = (v.x - mean) * scale * by.x + more.x, v.y = (v.y - mean) * scale * by.y + more.y;
        v.z = (v.z - mean) * scale * by.z + more.z, v.w = (v.w - mean) * scale * by.w + more.w;
        put(to + (long long)blockIdx.x * wide, i, width, wide, v);
    }
}

// Four logits of a row over a temperature; of those from `words` on, none has a chance.
__device__ __forceinline__ float4 heated(const T* row, int column, int words, float temperature) {
    float4 x = four(row + column);
    if (temperature != 1.0f) x.x /= temperature, x.y /= temperature, x.z /= temperature, x.w /= temperature;
    if (column + 3 >= words) {
        if (column >= words) x.x = -1.0e30f;
        if (column + 1 >= words) x.y = -1.0e30f;
        if (column + 2 >= words) x.z = -1.0e30f;
        x.w = -1.0e30f;
    }
    return x;
}

__device__ __forceinline__ float4 masses(float4 x, float highest) {
    return make_float4(expf(x.x - highest), expf(x.y - highest), expf(x.z - highest), expf(x.w - highest));
}

// Of each row of logits: the log-probability of one token, the entropy, and the sum of exp(logit - the highest of them);
// each logit makes way for that exp where `kept`. Grid (rows).
extern "C" __global__ void softmax(T* logits, const long long* tokens, float* logprobs, float* entropies, float* totals,
                                   int width, int words, int kept, double temperature) {
    __shared__ float shared[32];
    T* own = logits + (long long)blockIdx.x * width;
    const int first = 4 * threadIdx.x, next = 4 * blockDim.x;
    const float heat = (float)temperature;
    const long long token = tokens[blockIdx.x];  // what is no word gets NaN
    const float chosen = token >= 0 && token < words ? wider(own[token]) / heat : __int_as_float(0x7fc00000);
    float highest = -3.0e38f, total = 0, weighted = 0;  // `weighted`: of exp(x - highest) (x - highest)
    for (int i = first; i < width; i += next) {
        float4 x = heated(own, i, words, heat);
        float high = fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
        if (high > highest) {
            float less = highest - high, by = expf(less);
            weighted = by * (weighted + less * total), total *= by, highest = high;
        }
        float4 mass = masses(x, highest);
        total += mass.x + mass.y + mass.z + mass.w;
        weighted += mass.x * (x.x - highest) + mass.y * (x.y - highest)
                  + mass.z * (x.z - highest) + mass.w * (x.w - highest);
    }
    float of_all = highest_of(highest, shared), less = highest - of_all, by = expf(less);
    weighted = summed(by * (weighted + less * total), shared);
    total = summed(by * total, shared);
    if (threadIdx.x == 0) {
        logprobs[blockIdx.x] = chosen - of_all - logf(total);
        entropies[blockIdx.x] = logf(total) - weighted / total;
        totals[blockIdx.x] = total;
    }
    if (!kept) return;
    for (int i = first; i < width; i += next) store4(own + i, masses(heated(own, i, words, heat), of_all));
}

#ifdef EACH
#define LANES (WIDTH / 4)         // of a value, four numbers each
#define SHARES (THREADS / LANES)  // of the slots, whose values are added up side by side

// One token a row over what lies in the cache: queries and keys are rotated where `rotary`, keys and values written to
// slot `*slot`, and all slots up to it attended to. Grid (rows, groups); a block has the queries of one group.
//   x        (rows, heads + 2 groups, WIDTH): queries, keys, values
//   cosine, sine (rows, WIDTH), the first half of the sine negative
//   cache    (2, rows, groups, slots, WIDTH) keys and values
//   unseen   (rows, slots), added to the scores
// Shared: EACH queries, SHARES sums for each, and a score for each of them and each slot.
extern "C" __global__ void attend(const T* x, const T* cosine, const T* sine, T* cache, const T* unseen,
                                  const long long* slot, half_t* to, int slots, int wide, int rotary) {
    extern __shared__ float4 shared[];
    float *queries = (float*)shared, *sums = queries + EACH * WIDTH, *scores = sums + SHARES * EACH * WIDTH;
    const int rows = gridDim.x, groups = gridDim.y, row = blockIdx.x, group = blockIdx.y, heads = groups * EACH;
    const int at = (int)*slot, seen = at + 1;
    const T* own = x + (long long)row * (heads + 2 * groups) * WIDTH;
    T* keys = cache + ((long long)row * groups + group) * slots * WIDTH;
    T* values = keys + (long long)rows * groups * slots * WIDTH;

    for (int i = threadIdx.x; i < (EACH + 2) * WIDTH; i += THREADS) {
        int which = i / WIDTH, d = i % WIDTH;
        const T* one = own + (which < EACH ? group * EACH + which : heads + (which - EACH) * groups + group) * WIDTH;
        float value = wider(one[d]);
        if (rotary && which <= EACH) {
            value = value * wider(cosine[row * WIDTH + d])
                  + wider(one[(d + WIDTH / 2) % WIDTH]) * wider(sine[row * WIDTH + d]);
        }
        if (which < EACH) queries[i] = value * (1.0f / sqrtf((float)WIDTH));
        else store((which == EACH ? keys : values) + at * WIDTH + d, value);
    }
    __syncthreads();

    // Four lanes to a key.
    const int lane = threadIdx.x % 4;
    const unsigned int lanes = 0xfu << (threadIdx.x % 32 / 4 * 4);
#pragma unroll 2
    for (int s = threadIdx.x / 4; s < seen; s += THREADS / 4) {
        float added = wider(unseen[(long long)row * slots + s]), dots[EACH] = {};
#pragma unroll
        for (int d = 4 * lane; d < WIDTH; d += 16) {
            float4 key = four(keys + s * WIDTH + d);
#pragma unroll
            for (int q = 0; q < EACH; ++q) {
                float4 by = *(float4*)(queries + q * WIDTH + d);
                dots[q] += by.x * key.x + by.y * key.y + by.z * key.z + by.w * key.w;
            }
        }
#pragma unroll
        for (int q = 0; q < EACH; ++q) {
            dots[q] += __shfl_xor_sync(lanes, dots[q], 2);
            dots[q] += __shfl_xor_sync(lanes, dots[q], 1);
            if (lane == 0) scores[q * slots + s] = dots[q] + added;
        }
    }
    __syncthreads();

    // A warp to a query.
    for (int q = threadIdx.x / 32; q < EACH; q += THREADS / 32) {
        float most = -3.0e38f, total = 0;
        float* own_scores = scores + q * slots;
        for (int s = threadIdx.x % 32; s < seen; s += 32) most = fmaxf(most, own_scores[s]);
        for (int apart = 16; apart; apart >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, apart));
        for (int s = threadIdx.x % 32; s < seen; s += 32) total += own_scores[s] = expf(own_scores[s] - most);
        for (int apart = 16; apart; apart >>= 1) total += __shfl_xor_sync(~0u, total, apart);
        for (int s = threadIdx.x % 32; s < seen; s += 32) own_scores[s] /= total;
    }
    __syncthreads();

    const int column = threadIdx.x % LANES, share = threadIdx.x / LANES;
    if (share < SHARES) {
        float4 mixed[EACH] = {};
#pragma unroll 4
        for (int s = share; s < seen; s += SHARES) {
            float4 value = four(values + s * WIDTH + 4 * column);
#pragma unroll
            for (int q = 0; q < EACH; ++q) {
                float by = scores[q * slots + s];
                mixed[q].x += by * value.x, mixed[q].y += by * value.y;
                mixed[q].z += by * value.z, mixed[q].w += by * value.w;
            }
        }
        for (int q = 0; q < EACH; ++q) *(float4*)(sums + (share * EACH + q) * WIDTH + 4 * column) = mixed[q];
    }
    __syncthreads();
    for (int i = 4 * threadIdx.x; i < EACH * WIDTH; i += 4 * THREADS) {
        float4 all = *(float4*)(sums + i);
        for (int share = 1; share < SHARES; ++share) {
            float4 one = *(float4*)(sums + share * EACH * WIDTH + i);
            all.x += one.x, all.y += one.y, all.z += one.z, all.w += one.w;
        }
        put(to + (long long)row * wide, group * EACH * WIDTH + i, heads * WIDTH, wide, all);
    }
}
#endif
