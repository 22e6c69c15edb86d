/* Every function of lanes.h against the same in plain C, lane by lane.
 *
 * All 16-bit numbers are converted; of the floats that are rounded to 16 bits, every upper half
 * with the lower bits that decide: none, just below a tie, the tie, just above it.
 *
 * What is loaded and stored lies at the very end of memory (`end`): the caller sees to it that no
 * byte beyond can be touched. All but `stream`ed results are tried at four alignments.
 *
 * It needs no C library, so it also runs on a processor that is only emulated: call
 * check_lanes(end), which gives 0 or the line of the first check that failed.
 */
#include "lanes.h"

#include "plain.h"

#define CHECK(holds)                                                                               \
    do {                                                                                           \
        if (!(holds))                                                                              \
            return __LINE__;                                                                       \
    } while (0)
#define EACH_LANE for (int l = 0; l < LANES; l++)

#if defined(LORA_PORTABLE)
#define FUSED 0
#else
#define FUSED 1
#endif

int check_lanes(unsigned char *end);
extern const char lanes_name[];
const char lanes_name[] = LANES_NAME;

static unsigned char *memory_end;
static size_t shift; /* bytes that what is loaded or stored lies before the end, 0 .. 3 */

/* Room for so many bytes, at the end of memory. */
static void *room(size_t bytes) { return memory_end - shift - bytes; }

/* A copy there. */
static void *last(const void *data, size_t bytes) { return memcpy(room(bytes), data, bytes); }

static int check_arithmetic(void)
{
    float a[LANES], b[LANES], c[LANES], got[LANES];
    uint32_t flags[LANES];
    for (uint32_t i = 0; i < TRIPLES; i += LANES) {
        EACH_LANE a[l] = triple(i + (uint32_t)l, 0);
        EACH_LANE b[l] = triple(i + (uint32_t)l, 1);
        EACH_LANE c[l] = triple(i + (uint32_t)l, 2);
        const vf x = vf_load(a), y = vf_load(b), z = vf_load(c);
        vf_store(got, vf_add(x, y));
        EACH_LANE CHECK(same(got[l], a[l] + b[l]));
        vf_store(got, vf_mul(x, y));
        EACH_LANE CHECK(same(got[l], a[l] * b[l]));
        vf_store(got, vf_div(x, y));
        EACH_LANE CHECK(same(got[l], a[l] / b[l]));
        vf_store(got, vf_fma(x, y, z));
        EACH_LANE CHECK(same(got[l], FUSED ? fused(a[l], b[l], c[l]) : a[l] * b[l] + c[l]));
        vf_store(got, vu_floats(vu_if_greater(x, y, 0x89abcdef)));
        memcpy(flags, got, sizeof flags);
        EACH_LANE CHECK(flags[l] == (a[l] > b[l] ? 0x89abcdef : 0));
        vf_store(got, vu_floats(vu_append(vf_bits(z), x, y)));
        memcpy(flags, got, sizeof flags);
        EACH_LANE CHECK(flags[l] == 2 * bits_of(c[l]) + (a[l] > b[l]));
    }
    EACH_LANE a[l] = (float)(1 << l);
    CHECK(vf_sum(vf_load(a)) == (float)((1 << LANES) - 1));
    EACH_LANE b[l] = -a[l];
    vf even, odd;
    vf_unzip(vf_load(a), vf_load(b), &even, &odd);
    vf_store(got, even);
    vf_store(c, odd);
    for (int i = 0; i < 2 * LANES; i++) /* the numbers of a and b, in order */
        CHECK((i % 2 ? c : got)[i / 2] == (i < LANES ? a : b)[i % LANES]);
    return 0;
}

static int check_loads_and_stores(void)
{
    float a[LANES];
    EACH_LANE a[l] = float_of(noise((uint32_t)l)); /* NaN among them: its bits are kept */
    const vf x = vf_load(last(a, sizeof a));
    float *to = room(sizeof a);
    memset(to, 0, sizeof a);
    vf_store(to, x);
    CHECK(memcmp(to, a, sizeof a) == 0);
    vf_store(to, vu_floats(vu_load(last(a, sizeof a))));
    CHECK(memcmp(to, a, sizeof a) == 0);
    vf_store(to, vf_set1(0.1f));
    EACH_LANE CHECK(memcmp(to + l, &(float){0.1f}, 4) == 0);
    lanes_prefetch(0);
    lanes_prefetch(memory_end);
    lanes_prefetch((const void *)(uintptr_t)0xfedcba9876543210);
    lanes_fence();
    return 0;
}

static int check_integers(void)
{
    uint32_t a[LANES], b[LANES], got[LANES];
    for (uint32_t i = 0; i < 4096; i += LANES) {
        EACH_LANE a[l] = noise(2 * (i + (uint32_t)l));
        EACH_LANE b[l] = noise(2 * (i + (uint32_t)l) + 1);
        const vu x = vu_load(a), y = vu_load(b);
#define GOT(vector) vf_store((float *)(void *)got, vu_floats(vector))
        GOT(vu_add(x, y));
        EACH_LANE CHECK(got[l] == a[l] + b[l]);
        GOT(vu_and(x, y));
        EACH_LANE CHECK(got[l] == (a[l] & b[l]));
        GOT(vu_or(x, y));
        EACH_LANE CHECK(got[l] == (a[l] | b[l]));
        GOT(vf_bits(vu_floats(x)));
        EACH_LANE CHECK(got[l] == a[l]);
        GOT(vu_set1(a[0]));
        EACH_LANE CHECK(got[l] == a[0]);
        for (int bits = 0; bits < 32; bits++) {
            GOT(vu_shl(x, bits));
            EACH_LANE CHECK(got[l] == a[l] << bits);
        }
        const vu low = vu_set1(0x7fffffff);
        uint32_t most = 0;
        EACH_LANE most = (a[l] & 0x7fffffff) > most ? a[l] & 0x7fffffff : most;
        CHECK(vu_maximum(vu_and(x, low)) == most);
        GOT(vu_max(vu_and(x, low), vu_and(y, low)));
        EACH_LANE a[l] &= 0x7fffffff;
        EACH_LANE b[l] &= 0x7fffffff;
        EACH_LANE CHECK(got[l] == (a[l] > b[l] ? a[l] : b[l]));
        uint8_t *bytes = room(LANES);
        vu_store_bytes(bytes, y);
        EACH_LANE CHECK(bytes[l] == (b[l] & 255));
    }
    CHECK(vu_maximum(vu_set1(0)) == 0);
    for (int step = 1; step <= 256; step *= 2) {
        GOT(vu_lane_over(step));
        EACH_LANE CHECK(got[l] == (uint32_t)(l / step));
    }
    return 0;
}

static int check_from_16_bits(void)
{
    uint16_t halves[LANES];
    float got[LANES];
    for (uint32_t i = 0; i < 65536; i += LANES) {
        EACH_LANE halves[l] = (uint16_t)(i + (uint32_t)l);
        vf_store(got, vf_load_f16(last(halves, sizeof halves)));
        EACH_LANE CHECK(same(got[l], from_half(halves[l])));
        vf_store(got, vf_load_bf16(last(halves, sizeof halves)));
        EACH_LANE CHECK(same_bits(got[l], float_of((uint32_t)halves[l] << 16)));
    }
    return 0;
}

/* LANES floats to 16 bits, both ways. */
static int check_these_to_16_bits(const float *a)
{
    uint16_t got[LANES], *to = room(sizeof got);
    const vf x = vf_load(a);
    vf_store_f16(to, x);
    memcpy(got, to, sizeof got);
    EACH_LANE {
        const uint32_t sign = bits_of(a[l]) >> 16 & 0x8000, rest = got[l] & 0x7fff;
        CHECK(a[l] == a[l] ? got[l] == (sign | rounded(a[l], 10, -14, 0x7c00)) : rest > 0x7c00);
    }
    vf_store_bf16(to, x);
    memcpy(got, to, sizeof got);
    EACH_LANE {
        const uint32_t sign = bits_of(a[l]) >> 16 & 0x8000;
        CHECK(got[l] == (a[l] == a[l] ? sign | rounded(a[l], 7, -126, 0x7f80) : 0x7fc0));
    }
    return 0;
}

/* Every float whose last `low` bits are zero, of both signs, and those around what they decide. */
static int check_to_16_bits(int low, uint32_t from, uint32_t to)
{
    const uint32_t half = 1u << (low - 1);
    const uint32_t offset[] = {0, 1, half - 1, half, half + 1, 2 * half - 1};
    float a[LANES];
    for (uint32_t i = from; i < to; i += LANES << low)
        for (uint32_t k = 0; k < 12; k++) {
            EACH_LANE a[l] = float_of(k << 31 | (i + ((uint32_t)l << low) + offset[k / 2]));
            const int line = check_these_to_16_bits(a);
            if (line)
                return line;
        }
    return 0;
}

static int check_from_doubles(void)
{
    double a[LANES];
    float got[LANES];
    for (uint32_t i = 0; i < 65536; i += LANES) {
        EACH_LANE { /* special floats, near them, near ties, and exponents of all sizes */
            const uint32_t n = i + (uint32_t)l, kind = n % 4;
            const double special = float_of(specials[n / 8 % SPECIALS]);
            uint64_t bits = (uint64_t)noise(n) << 32 | noise(~n);
            if (kind == 0)
                memcpy(&bits, &special, 8);
            if (kind < 2)
                bits += (uint64_t)(n >> 2 & 1);
            if (kind == 2)
                bits = (bits & ~0x1fffffffull) + 0x0fffffff + (bits >> 3) % 3;
            if (kind != 0 && n % 8 < 4) /* within what a float holds, and a little more */
                bits = (bits & 0x800fffffffffffffull) | (uint64_t)(860 + n / 8 % 300) << 52;
            a[l] = double_of(bits);
        }
        vf_store(got, vf_load_f64(last(a, sizeof a)));
        EACH_LANE {
            const uint32_t sign = __builtin_signbit(a[l]) ? 0x80000000 : 0;
            const uint32_t want = sign | rounded(a[l], 23, -126, 0x7f800000);
            CHECK(a[l] == a[l] ? bits_of(got[l]) == want : got[l] != got[l]);
        }
    }
    return 0;
}

static int check_lookups(void)
{
    float table[256], got[LANES];
    uint32_t index[LANES];
    uint8_t bytes[LANES];
    for (uint32_t i = 0; i < 256; i++)
        table[i] = float_of(noise(i)); /* any bits: lookups keep them */
    const vtable registers = vtable_load(last(table, 64));
    for (uint32_t i = 0; i < 4096; i++) {
        EACH_LANE index[l] = noise(i + (uint32_t)l * 4099) & 15;
        vf_store(got, vf_lookup(registers, vu_load(index)));
        EACH_LANE CHECK(same_bits(got[l], table[index[l]]));

        EACH_LANE index[l] &= 7;
        vf_store(got, vf_pick8(last(table, 32), vu_load(index)));
        EACH_LANE CHECK(same_bits(got[l], table[index[l]]));

        EACH_LANE index[l] &= 3;
        vf_store(got, vf_pick(last(table, 16), vu_load(index)));
        EACH_LANE CHECK(same_bits(got[l], table[index[l]]));

        EACH_LANE index[l] = noise(i + (uint32_t)l * 4099);
        for (int j = 0; j < 8; j++) {
            vf_store(got, vf_nibble(registers, vu_load(index), j));
            EACH_LANE CHECK(same_bits(got[l], table[index[l] >> 4 * j & 15]));
        }
        EACH_LANE bytes[l] = (uint8_t)index[l];
        vf_store(got, vf_gather256(table, last(bytes, LANES)));
        EACH_LANE CHECK(same_bits(got[l], table[bytes[l]]));
        if (i < 256) {
            vf_store(got, vf_gather256(last(table, sizeof table), bytes));
            EACH_LANE CHECK(same_bits(got[l], table[bytes[l]]));
        }
    }
    return 0;
}

static int check_expansions(int stream)
{
    float table[16], *floats = room(128);
    uint16_t halves[16], *words = room(64);
    uint8_t codes[16];
    for (uint32_t i = 0; i < 16; i++) {
        table[i] = float_of(noise(i));
        halves[i] = (uint16_t)noise(i + 16);
    }
    const vtable registers = vtable_load(table);
    const half_table half_registers = half_table_load(last(halves, sizeof halves));
    for (uint32_t i = 0; i < 256; i++) { /* each byte at each place */
        for (uint32_t k = 0; k < 16; k++)
            codes[k] = (uint8_t)(i + 37 * k);
        float_expand32(registers, codes, floats, stream);
        lanes_fence();
        for (int k = 0; k < 32; k++)
            CHECK(memcmp(floats + k, table + (codes[k / 2] >> (k % 2 ? 0 : 4) & 15), 4) == 0);
        half_expand32(half_registers, codes, words, stream);
        lanes_fence();
        for (int k = 0; k < 32; k++)
            CHECK(memcmp(words + k, halves + (codes[k / 2] >> (k % 2 ? 0 : 4) & 15), 2) == 0);
    }
    float wide[32];
    uint16_t narrow[32];
    float_expand32(registers, last(codes, 16), wide, 0);
    half_expand32(half_registers, last(codes, 16), narrow, 0);
    for (int k = 0; k < 32; k++) {
        CHECK(same_bits(wide[k], table[codes[k / 2] >> (k % 2 ? 0 : 4) & 15]));
        CHECK(narrow[k] == halves[codes[k / 2] >> (k % 2 ? 0 : 4) & 15]);
    }
    return 0;
}

int check_lanes(unsigned char *end)
{
    int line = 0;
    memory_end = end;
    for (shift = 0; shift < 4 && !line; shift++) {
        line = line ? line : check_loads_and_stores();
        line = line ? line : check_lookups();
        line = line ? line : check_expansions(0);
        line = line ? line : check_integers();
        line = line ? line : check_from_16_bits();
        line = line ? line : check_to_16_bits(16, 0, 0x80000000);
    }
    shift = 0;
    line = line ? line : check_expansions(1);
    line = line ? line : check_arithmetic();
    line = line ? line : check_to_16_bits(13, 101u << 23, 145u << 23); /* where f16 has numbers */
    return line ? line : check_from_doubles();
}

#if defined(LORA_HOSTED)
#include <stdio.h>
#include <sys/mman.h>

/* Two pages, of which the second may not be touched. */
int main(void)
{
    const size_t page = 1 << 16;
    const int access = PROT_READ | PROT_WRITE;
    unsigned char *memory = mmap(NULL, 2 * page, access, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory + page, page, PROT_NONE) != 0)
        return 2;
    const int line = check_lanes(memory + page);
    printf("%s %d\n", lanes_name, line);
    return line != 0;
}
#endif
