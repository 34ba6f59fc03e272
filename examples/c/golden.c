/* A golden client without Python: RMSNorm, RoPE and the LoRA layer, forward and backward, in float.
 *
 *     cc -std=c11 -O2 -o golden golden.c -lm
 *     ./golden path/to/suite
 *
 * It reads manifest.json and the case files of the suite, computes every case of ops/rmsnorm,
 * ops/rope and ops/lora_linear, and holds the result against `want` within the suite's tolerance.
 * Exit code 0: all agree; 1: something differs; 2: the suite cannot be read. A suite may come from a
 * stranger: every name, shape and offset is held against the file before it is used.
 *
 * Assumes a little-endian machine, as the files are.
 */
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEEPEST = 64, AXES = 8, LONGEST = 300 };

/* Prints a line in which nothing but printable ASCII is left: names come from a file, and a terminal
   would obey what they hold. */
static void say(FILE *to, const char *format, va_list args)
{
    char line[LONGEST];
    vsnprintf(line, sizeof line, format, args);
    for (char *c = line; *c; c++)
        if ((unsigned char)*c < 32 || (unsigned char)*c > 126) *c = '?';
    fprintf(to, "%s\n", line);
}

static void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fprintf(stderr, "golden: ");
    say(stderr, format, args);
    va_end(args);
    exit(2);
}

static void tell(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    say(stdout, format, args);
    va_end(args);
}

/* Every block of memory hangs on one chain, whose youngest part is freed after each case. */
typedef union Block {
    union Block *older;
    max_align_t aligned;
} Block;

static Block *youngest;

static void release(const Block *until)
{
    while (youngest != until) {
        Block *older = youngest->older;
        free(youngest);
        youngest = older;
    }
}

static void release_all(void) { release(NULL); }

/* Zeroed memory for `count` things of a size. */
static void *reserve(size_t count, size_t size)
{
    if (count > (SIZE_MAX / 2 - sizeof(Block)) / size) die("out of memory");
    Block *block = calloc(1, sizeof(Block) + count * size);
    if (!block) die("out of memory");
    block->older = youngest;
    youngest = block;
    return block + 1;
}

static char *read_file(const char *path, size_t *size)
{
    FILE *file = fopen(path, "rb");
    if (!file) die("%s: cannot be opened", path);
    long length = fseek(file, 0, SEEK_END) ? -1 : ftell(file);
    char *text = length < 0 || length == LONG_MAX ? NULL : reserve((size_t)length + 1, 1);
    rewind(file);
    size_t found = text ? fread(text, 1, (size_t)length, file) : 0;
    fclose(file);
    if (!text || found != (size_t)length) die("%s: cannot be read", path);
    *size = found;
    return text;
}

/* -- JSON: a value is a tree of nodes, siblings in a list ------------------------------------- */

typedef struct Node {
    char *key;              /* of a member of an object, else NULL */
    char kind;              /* '{' '[' '"' 'n' (number) or 'x' (true, false, null) */
    char *text;             /* of a string */
    double number;
    struct Node *child, *next;
} Node;

static const char *cursor; /* of a text that ends with 0 */

static void skip(void) { while (*cursor && strchr(" \t\r\n,:", *cursor)) cursor++; }

static char *string(void)
{
    const char *end = cursor + 1;
    if (*cursor != '"') die("JSON: expected a string");
    while (*end && *end != '"') end += end[0] == '\\' && end[1] ? 2 : 1;
    if (!*end) die("JSON ends too early");
    char *text = reserve((size_t)(end - cursor), 1), *to = text;
    for (cursor++; cursor < end; cursor++) {
        if (*cursor == '\\') cursor++; /* names hold no other escapes */
        *to++ = *cursor;
    }
    cursor++;
    return text;
}

static Node *value(int depth)
{
    Node *node = reserve(1, sizeof *node);
    if (depth > DEEPEST) die("JSON: nested too deeply");
    skip();
    node->kind = *cursor;
    if (*cursor == '"') {
        node->text = string();
    } else if (*cursor == '{' || *cursor == '[') {
        char end = *cursor++ == '{' ? '}' : ']';
        Node **to = &node->child;
        for (skip(); *cursor != end; skip()) {
            char *key = end == '}' ? string() : NULL;
            *to = value(depth + 1);
            (*to)->key = key;
            to = &(*to)->next;
        }
        cursor++;
    } else {
        char *end;
        node->kind = 'n';
        node->number = strtod(cursor, &end);
        if (end == cursor) {
            node->kind = 'x';
            while (*end >= 'a' && *end <= 'z') end++;
        }
        if (end == cursor) die("JSON: expected a value");
        cursor = end;
    }
    return node;
}

static const Node *find(const Node *object, const char *key)
{
    for (const Node *node = object ? object->child : NULL; node; node = node->next)
        if (node->key && !strcmp(node->key, key)) return node;
    return NULL;
}

/* A member that must be there, of a kind. */
static const Node *member(const Node *object, const char *key, char kind)
{
    const Node *node = find(object, key);
    if (!node || node->kind != kind) die("%s: missing or of another kind", key);
    return node;
}

static double number(const Node *object, const char *key) { return member(object, key, 'n')->number; }

static const char *text(const Node *object, const char *key) { return member(object, key, '"')->text; }

/* -- safetensors ------------------------------------------------------------------------------ */

typedef struct {
    size_t size, rank, shape[AXES];
    double *data; /* widened: float32 and float64 both fit */
} Tensor;

typedef struct {
    char *bytes;
    size_t size, start;
    Node *header;
} File;

static File open_tensors(const char *path)
{
    File file;
    uint64_t length;
    file.bytes = read_file(path, &file.size);
    if (file.size < 8) die("%s: not a safetensors file", path);
    memcpy(&length, file.bytes, 8);
    if (length > file.size - 8) die("%s: truncated", path);
    char *header = reserve((size_t)length + 1, 1);
    memcpy(header, file.bytes + 8, (size_t)length);
    cursor = header;
    file.header = value(0);
    file.start = 8 + (size_t)length;
    return file;
}

/* An element of a list of sizes: what is no whole number, or beyond the file, is refused. */
static size_t whole(const Node *node, const char *key, size_t most)
{
    if (!node || node->kind != 'n' || !(node->number >= 0 && node->number <= (double)most)) {
        die("%s: a size or offset is no number up to %.0f", key, (double)most);
    }
    size_t found = (size_t)node->number;
    if ((double)found != node->number) die("%s: a size or offset is no whole number", key);
    return found;
}

/* An absent tensor has no data: the bias of a layer without one. */
static Tensor tensor(const File *file, const char *group, const char *name)
{
    char key[128];
    Tensor t = {1, 0, {0}, NULL};
    snprintf(key, sizeof key, "%s/%s", group, name);
    const Node *entry = find(file->header, key);
    if (!entry) return t;
    size_t held = file->size - file->start;
    for (const Node *n = member(entry, "shape", '[')->child; n; n = n->next) {
        if (t.rank == AXES) die("%s: too many axes", key);
        size_t length = t.shape[t.rank++] = whole(n, key, held);
        if (length && t.size > held / length) die("%s: larger than its file", key);
        t.size *= length;
    }
    int wide = !strcmp(text(entry, "dtype"), "F64");
    if (!wide && strcmp(text(entry, "dtype"), "F32")) die("%s: expected F32 or F64", key);
    const Node *offsets = member(entry, "data_offsets", '[')->child;
    size_t start = whole(offsets, key, held), stop = whole(offsets->next, key, held);
    if (stop < start || stop - start != t.size * (wide ? 8 : 4)) die("%s: bytes and shape differ", key);
    const char *from = file->bytes + file->start + start;
    t.data = reserve(t.size, sizeof *t.data);
    for (size_t i = 0; i < t.size; i++) {
        float narrow;
        if (wide) {
            memcpy(&t.data[i], from + 8 * i, 8);
        } else {
            memcpy(&narrow, from + 4 * i, 4);
            t.data[i] = narrow;
        }
    }
    return t;
}

/* An input that must be there, with so many axes (0: any number). */
static Tensor input(const File *file, const char *name, size_t rank)
{
    Tensor t = tensor(file, "in", name);
    if (!t.data || (rank && t.rank != rank)) die("in/%s: missing, or with other axes", name);
    return t;
}

static void same(size_t found, size_t expected, const char *what)
{
    if (found != expected) die("%s: shapes do not fit", what);
}

/* Inputs are exact in float. */
static float *floats(Tensor t)
{
    if (!t.data) return NULL;
    float *x = reserve(t.size, sizeof *x);
    for (size_t i = 0; i < t.size; i++) {
        if (isfinite(t.data[i]) && fabs(t.data[i]) > FLT_MAX) die("an input is beyond float");
        x[i] = (float)t.data[i];
    }
    return x;
}

/* -- the operations --------------------------------------------------------------------------- */

typedef struct {
    const char *name;
    float *data;
    size_t size;
} Result;

static float *zeros(size_t n) { return reserve(n, sizeof(float)); }

/* y = w x / n, n = sqrt(mean(x²) + eps); dx = u/n − x·mean(u x)/n³ with u = dy w; dw = Σ dy x / n */
static size_t rmsnorm(const File *file, const Node *attributes, Result *out)
{
    Tensor shape = input(file, "x", 0), gain = input(file, "w", 1), up = input(file, "dy", shape.rank);
    size_t c = gain.size, rows = c ? shape.size / c : 0;
    same(rows * c, shape.size, "rmsnorm");
    same(up.size, shape.size, "rmsnorm");
    float *x = floats(shape), *w = floats(gain), *dy = floats(up);
    float *y = zeros(shape.size), *dx = zeros(shape.size), *dw = zeros(c);
    float eps = (float)number(attributes, "eps");
    for (size_t m = 0; m < rows; m++) {
        float *xm = x + m * c, *dm = dy + m * c, square = 0, along = 0;
        for (size_t i = 0; i < c; i++) square += xm[i] * xm[i];
        float r = 1 / sqrtf(square / (float)c + eps);
        for (size_t i = 0; i < c; i++) along += dm[i] * w[i] * xm[i];
        along = along / (float)c * r * r * r;
        for (size_t i = 0; i < c; i++) {
            y[m * c + i] = xm[i] * r * w[i];
            dx[m * c + i] = dm[i] * w[i] * r - xm[i] * along;
            dw[i] += dm[i] * xm[i] * r;
        }
    }
    out[0] = (Result){"y", y, shape.size};
    out[1] = (Result){"dx", dx, shape.size};
    out[2] = (Result){"dw", dw, c};
    return 3;
}

/* Element i of a head turns with element i + D/2; `sign` −1 turns back, which is the gradient. */
static void turn(const float *x, const float *cos, const float *sin, float sign, const size_t *shape,
                 size_t size, float *y)
{
    size_t t = shape[1], h = shape[2], d = shape[3], half = d / 2;
    for (size_t at = 0; at < (d ? size / d : 0); at++) {
        size_t position = at / h % t;
        const float *c = cos + position * half, *s = sin + position * half, *from = x + at * d;
        for (size_t i = 0; i < half; i++) {
            y[at * d + i] = from[i] * c[i] - sign * from[i + half] * s[i];
            y[at * d + i + half] = from[i + half] * c[i] + sign * from[i] * s[i];
        }
    }
}

static size_t rope(const File *file, const Node *attributes, Result *out)
{
    (void)attributes;
    Tensor shape = input(file, "x", 4), up = input(file, "dy", 4);
    Tensor cosines = input(file, "cos", 2), sines = input(file, "sin", 2);
    same(up.size, shape.size, "rope");
    same(shape.shape[3] % 2, 0, "rope");
    same(cosines.size, shape.shape[1] * (shape.shape[3] / 2), "rope");
    same(sines.size, cosines.size, "rope");
    float *x = floats(shape), *dy = floats(up), *c = floats(cosines), *s = floats(sines);
    float *y = zeros(shape.size), *dx = zeros(shape.size);
    turn(x, c, s, 1, shape.shape, shape.size, y);
    turn(dy, c, s, -1, shape.shape, shape.size, dx);
    out[0] = (Result){"y", y, shape.size};
    out[1] = (Result){"dx", dx, shape.size};
    return 2;
}

/* h = x Aᵀ, y = x Wᵀ + b + s h Bᵀ; dh = s dy B, dx = dy W + dh A, dA = dhᵀ x, dB = s dyᵀ h */
static size_t lora_linear(const File *file, const Node *attributes, Result *out)
{
    Tensor shape = input(file, "x", 0), wide = input(file, "w", 2), low = input(file, "A", 2);
    Tensor high = input(file, "B", 2), up = input(file, "dy", 0), bias = tensor(file, "in", "b");
    size_t in = wide.shape[1], o = wide.shape[0], r = low.shape[0], rows = in ? shape.size / in : 0;
    same(rows * in, shape.size, "lora_linear");
    same(rows * o, up.size, "lora_linear");
    same(low.shape[1], in, "lora_linear");
    same(high.shape[0], o, "lora_linear");
    same(high.shape[1], r, "lora_linear");
    if (bias.data) same(bias.size, o, "lora_linear");
    float *x = floats(shape), *w = floats(wide), *b = floats(bias), *A = floats(low);
    float *B = floats(high), *dy = floats(up);
    float *y = zeros(rows * o), *dx = zeros(shape.size), *dA = zeros(r * in), *dB = zeros(o * r);
    float *h = zeros(r), *dh = zeros(r), s = (float)number(attributes, "s");
    for (size_t m = 0; m < rows; m++) {
        float *xm = x + m * in, *dm = dy + m * o;
        for (size_t k = 0; k < r; k++) {
            h[k] = dh[k] = 0;
            for (size_t i = 0; i < in; i++) h[k] += xm[i] * A[k * in + i];
            for (size_t j = 0; j < o; j++) dh[k] += s * dm[j] * B[j * r + k];
            for (size_t i = 0; i < in; i++) dA[k * in + i] += dh[k] * xm[i];
            for (size_t i = 0; i < in; i++) dx[m * in + i] += dh[k] * A[k * in + i];
            for (size_t j = 0; j < o; j++) dB[j * r + k] += s * dm[j] * h[k];
        }
        for (size_t j = 0; j < o; j++) {
            float sum = b ? b[j] : 0;
            for (size_t i = 0; i < in; i++) sum += xm[i] * w[j * in + i];
            for (size_t k = 0; k < r; k++) sum += s * h[k] * B[j * r + k];
            y[m * o + j] = sum;
            for (size_t i = 0; i < in; i++) dx[m * in + i] += dm[j] * w[j * in + i];
        }
    }
    out[0] = (Result){"y", y, rows * o};
    out[1] = (Result){"dx", dx, shape.size};
    out[2] = (Result){"dA", dA, r * in};
    out[3] = (Result){"dB", dB, o * r};
    return 4;
}

/* -- the check -------------------------------------------------------------------------------- */

/* Largest error as a share of the tolerance; infinite where a value is not finite. */
static double margin(const Result *got, const File *file, const Node *expected, const Node *unit)
{
    Tensor want = tensor(file, "want", got->name), mag = tensor(file, "mag", got->name);
    double k = number(expected, "k"), s = number(expected, "s"), worst = 0;
    if (!want.data || !mag.data || want.size != got->size || mag.size != got->size) return INFINITY;
    for (size_t i = 0; i < want.size; i++) {
        double error = fabs((double)got->data[i] - want.data[i]);
        double allowed = (s * number(unit, "store") + 4 * sqrt(k) * number(unit, "sum")) * mag.data[i]
                       + s * number(unit, "eta");
        double share = error == 0 ? 0 : allowed > 0 ? error / allowed : INFINITY;
        if (!isfinite(got->data[i])) share = INFINITY;
        if (share > worst) worst = share;
    }
    return worst;
}

static const Node *expected_tensor(const Node *entry, const char *name)
{
    for (const Node *node = member(entry, "tensors", '[')->child; node; node = node->next)
        if (!strcmp(text(node, "name"), name)) return node;
    die("manifest.json: %s: expected tensor %s", text(entry, "name"), name);
    return NULL;
}

/* The path of a file inside the suite. */
static void place(char *path, size_t size, const char *root, const char *name)
{
    if (*name == '/' || strstr(name, "..") || strchr(name, '\\')) die("%s: leads out of the suite", name);
    int length = snprintf(path, size, "%s/%s", root, name);
    if (length < 0 || (size_t)length >= size) die("the path of a file is too long");
}

int main(int count, char **arguments)
{
    static const struct {
        const char *op;
        size_t (*compute)(const File *, const Node *, Result *);
    } OPS[] = {{"rmsnorm", rmsnorm}, {"rope", rope}, {"lora_linear", lora_linear}};
    if (count != 2) die("usage: golden SUITE");
    char path[4096];
    size_t size;
    int tensors = 0, wrong = 0;
    atexit(release_all);
    place(path, sizeof path, arguments[1], "manifest.json");
    cursor = read_file(path, &size);
    const Node *manifest = value(0);
    if (strcmp(text(manifest, "format"), "mesp-ref golden suite") || number(manifest, "version") != 2)
        die("%s: expected a golden suite of version 2", path);
    const Node *unit = member(member(manifest, "units", '{'), "float32", '{');
    for (const Node *entry = member(manifest, "cases", '[')->child; entry; entry = entry->next) {
        const Node *attributes = find(entry, "attributes"), *op = find(attributes, "op");
        for (size_t i = 0; op && op->kind == '"' && i < sizeof OPS / sizeof *OPS; i++) {
            if (strcmp(op->text, OPS[i].op) || strcmp(text(entry, "kind"), "op")) continue;
            const Block *before = youngest;
            Result results[4];
            place(path, sizeof path, arguments[1], text(entry, "file"));
            File file = open_tensors(path);
            size_t found = OPS[i].compute(&file, attributes, results);
            for (size_t j = 0; j < found; j++, tensors++) {
                double share = margin(&results[j], &file, expected_tensor(entry, results[j].name), unit);
                if (!(share <= 1)) wrong++;
                tell("%s %-32.64s %-3s %6.1f%% of the tolerance", share <= 1 ? "ok  " : "FAIL",
                     text(entry, "name"), results[j].name, 100 * share);
            }
            release(before);
        }
    }
    tell("%d of %d tensors agree", tensors - wrong, tensors);
    return wrong || !tensors;
}
