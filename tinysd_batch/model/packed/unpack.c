/* Dequantize on the CPU: turn codes of 2, 4 or 8 bits into floats.

   Codes that share a scale and an offset form a line: a group of a row, or a whole row.

       weight = (code + shift) * scale + offset

   is computed in float32 and rounded once, to nearest, to the output type. If the scale is a float16 number, its
   product with a code is exact; rows with a zero point have no offset. So it makes no difference whether the compiler
   fuses the two operations, and the result is bit-identical to plain torch.

   cpu_kernel.py calls it; hatch_build.py compiles it once for each CPU type. Vectors are GCC's and Clang's vector
   extensions, which work on any CPU. */

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16 };
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

enum kind { GROUPS, AFFINE_ROWS, ZERO_POINT_ROWS };
enum type { FLOAT32, FLOAT16, BFLOAT16 };

struct work {
    const uint8_t *codes;
    const void *parameters[3]; /* groups: qscale, qoff, qmeta; affine rows: qaffine; zero point: qzero, qdelta */
    uint8_t *out;
    int64_t rows, row_lines, columns; /* columns: codes in a line */
    int64_t next, at_once;            /* the next row to process, and how many rows a thread takes at a time */
    int32_t bits, kind, type;
};

struct affine {
    float shift, scale, offset;
};

INLINE words blend(integers mask, words yes, words no) { return ((words)mask & yes) | (~(words)mask & no); }

/* float16 as bits, since older compilers do not have the type. Its exponent bias is 15, that of float32 is 127;
   products with powers of two are exact, also for subnormal numbers. */

INLINE floats of_halves(words half) {
    words bits = (words)((floats)((half & 0x7fff) << 13) * 0x1p112f);
    words infinite = (words)((half & 0x7c00) == 0x7c00) & 0x7f800000;
    return (floats)(bits | infinite | (half & 0x8000) << 16);
}

INLINE words to_halves(floats values) {
    words bits = (words)values, magnitude = bits & 0x7fffffff;
    words normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    words small = (words)((floats)magnitude + 0.5f) - 0x3f000000; /* near 0.5, one unit is float16's smallest number */
    words finite = blend((integers)(magnitude < 0x38800000), small, normal);
    words infinite = (words)(magnitude > 0x7f800000) & 0x0200; /* NaN */
    return blend((integers)(magnitude >= 0x477ff000), infinite | 0x7c00, finite) | (bits >> 16 & 0x8000);
}

INLINE float of_half(uint16_t half) { return of_halves((words){half})[0]; }

/* The numbers of groups: minimum + step * byte, rounded to float16. The product is exact. */
INLINE floats of_bytes(const uint8_t *at, int64_t count, const uint16_t *meta) {
    bytes loaded = {0};
    memcpy(&loaded, at, count);
    floats numbers = __builtin_convertvector(__builtin_convertvector(loaded, integers), floats);
    return of_halves(to_halves(numbers * of_half(meta[1]) + of_half(meta[0])));
}

/* In two steps, by way of 16 bits, for which CPUs have instructions */
INLINE integers of_small(bytes numbers) {
    return __builtin_convertvector(__builtin_convertvector(numbers, halves), integers);
}

/* LANES codes: at 2 bits in one word, at 4 bits in two, at 8 bits in bytes */
INLINE integers codes_at(const uint8_t *at, int bits) {
    if (bits == 8) {
        bytes loaded;
        memcpy(&loaded, at, sizeof loaded);
        return of_small(loaded);
    }
    words shifts;
    for (int lane = 0; lane < LANES; lane++)
        shifts[lane] = lane * bits % 32;
    uint32_t word[2] = {0, 0};
    memcpy(word, at, 2 * bits);
    const uint32_t first = word[0], second = word[bits == 4];
    words packed = {first,  first,  first,  first,  first,  first,  first,  first,
                    second, second, second, second, second, second, second, second};
    return (integers)((packed >> shifts) & ((1u << bits) - 1));
}

INLINE void write(floats values, int64_t count, uint8_t *out, int type) {
    if (type == FLOAT32) {
        memcpy(out, &values, 4 * count);
        return;
    }
    words bits = (words)values;
    bits = type == FLOAT16 ? to_halves(values) : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    halves rounded = __builtin_convertvector(bits, halves);
    memcpy(out, &rounded, 2 * count);
}

INLINE void unpack_some(const uint8_t *codes, int64_t count, struct affine by, uint8_t *out, int bits, int type) {
    floats values = __builtin_convertvector(codes_at(codes, bits), floats);
    write((values + by.shift) * by.scale + by.offset, count, out, type);
}

INLINE void unpack_line(const uint8_t *codes, int64_t columns, struct affine by, uint8_t *out, int bits, int type) {
    const int size = type == FLOAT32 ? 4 : 2;
    int64_t column = 0;
    for (; column + LANES <= columns; column += LANES)
        unpack_some(codes + column * bits / 8, LANES, by, out + column * size, bits, type);
    if (column < columns) { /* do not read or write beyond the line */
        uint8_t last[LANES] = {0};
        memcpy(last, codes + column * bits / 8, (columns - column) * bits / 8);
        unpack_some(last, columns - column, by, out + column * size, bits, type);
    }
}

INLINE void unpack_row(const struct work *work, int64_t row, int bits, int kind, int type) {
    const int64_t lines = work->row_lines, columns = work->columns;
    const int64_t code_bytes = columns * bits / 8, out_bytes = columns * (type == FLOAT32 ? 4 : 2);
    const uint8_t *codes = work->codes + row * lines * code_bytes;
    uint8_t *out = work->out + row * lines * out_bytes;
    const void *const *parameters = work->parameters;
    if (kind == GROUPS) {
        const uint8_t *scale_bytes = (const uint8_t *)parameters[0] + row * lines;
        const uint8_t *offset_bytes = (const uint8_t *)parameters[1] + row * lines;
        const uint16_t *meta = (const uint16_t *)parameters[2] + 4 * row;
        for (int64_t first = 0; first < lines; first += LANES) {
            int64_t count = lines - first < LANES ? lines - first : LANES;
            floats scales = of_bytes(scale_bytes + first, count, meta);
            floats offsets = of_bytes(offset_bytes + first, count, meta + 2);
            for (int64_t line = 0; line < count; line++) {
                struct affine by = {0, scales[line], offsets[line]};
                unpack_line(codes + (first + line) * code_bytes, columns, by, out + (first + line) * out_bytes, bits,
                            type);
            }
        }
    } else if (kind == AFFINE_ROWS) {
        const uint16_t *affine = (const uint16_t *)parameters[0] + 2 * row;
        struct affine by = {0, of_half(affine[0]), of_half(affine[1])};
        unpack_line(codes, columns, by, out, bits, type);
    } else {
        struct affine by = {-(float)((const uint8_t *)parameters[0])[row], ((const float *)parameters[1])[row], 0};
        unpack_line(codes, columns, by, out, bits, type);
    }
}

/* A separate loop for each case, in which `bits`, `kind` and `type` are constants */

#define OF_TYPE(BITS, KIND, TYPE)                   \
    if (work->type == TYPE)                         \
        for (int64_t row = from; row < to; row++)   \
            unpack_row(work, row, BITS, KIND, TYPE);
#define OF_KIND(BITS, KIND)           \
    if (work->kind == KIND) {         \
        OF_TYPE(BITS, KIND, FLOAT32)  \
        OF_TYPE(BITS, KIND, FLOAT16)  \
        OF_TYPE(BITS, KIND, BFLOAT16) \
    }
#define OF_BITS(BITS)                  \
    if (work->bits == BITS) {          \
        OF_KIND(BITS, GROUPS)          \
        OF_KIND(BITS, AFFINE_ROWS)     \
        OF_KIND(BITS, ZERO_POINT_ROWS) \
    }

/* Called by any number of threads with the same struct; each takes rows until none are left. */
void unpack(struct work *work) {
    for (;;) {
        int64_t from = __atomic_fetch_add(&work->next, work->at_once, __ATOMIC_RELAXED);
        if (from >= work->rows)
            return;
        int64_t to = from + work->at_once < work->rows ? from + work->at_once : work->rows;
        OF_BITS(2)
        OF_BITS(4)
        OF_BITS(8)
    }
}
