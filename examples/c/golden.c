/* A golden client without Python: RMSNorm, RoPE and the LoRA layer, forward and backward, in float.
 *
 *     cc -std=c11 -O2 -o golden golden.c -lm
 *     ./golden path/to/suite
 *
 * It reads manifest.json and the case files of the suite, computes every case of ops/rmsnorm,
 * ops/rope and ops/lora_linear, and holds the result against `want` within the suite's tolerance.
 * Exit code 0: all agree; 1: something differs; 2: the suite cannot be read.
 *
 * Assumes a little-endian machine, as the files are.
 */
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fprintf(stderr, "golden: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(2);
}

static void *reserve(size_t bytes)
{
    void *memory = malloc(bytes ? bytes : 1);
    if (!memory) die("out of memory");
    return memory;
}

static char *read_file(const char *path, size_t *size)
{
    FILE *file = fopen(path, "rb");
    if (!file) die("%s: cannot be opened", path);
    if (fseek(file, 0, SEEK_END)) die("%s: cannot be read", path);
    long length = ftell(file);
    if (length < 0) die("%s: cannot be read", path);
    rewind(file);
    char *text = reserve((size_t)length + 1);
    if (fread(text, 1, (size_t)length, file) != (size_t)length) die("%s: cannot be read", path);
    fclose(file);
    text[length] = 0;
    *size = (size_t)length;
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

static const char *cursor;

static void skip(void) { while (*cursor && strchr(" \t\r\n,:", *cursor)) cursor++; }

static char *string(void)
{
    char *text = reserve(strlen(cursor)), *to = text;
    for (cursor++; *cursor && *cursor != '"'; cursor++) {
        if (*cursor == '\\' && cursor[1]) cursor++; /* names hold no other escapes */
        *to++ = *cursor;
    }
    if (*cursor) cursor++;
    *to = 0;
    return realloc(text, (size_t)(to - text) + 1);
}

static Node *value(void)
{
    Node *node = calloc(1, sizeof *node);
    if (!node) die("out of memory");
    skip();
    node->kind = *cursor;
    if (*cursor == '"') {
        node->text = string();
    } else if (*cursor == '{' || *cursor == '[') {
        char end = *cursor++ == '{' ? '}' : ']';
        Node **to = &node->child;
        for (skip(); *cursor && *cursor != end; skip()) {
            char *key = end == '}' ? string() : NULL;
            *to = value();
            (*to)->key = key;
            to = &(*to)->next;
        }
        if (*cursor) cursor++;
    } else if (strchr("-0123456789", *cursor) && *cursor) {
        char *end;
        node->kind = 'n';
        node->number = strtod(cursor, &end);
        cursor = end;
    } else {
        node->kind = 'x';
        if (!*cursor) die("JSON ends too early");
        while (*cursor && !strchr(" \t\r\n,:]}", *cursor)) cursor++;
    }
    return node;
}

static Node *find(const Node *object, const char *key)
{
    for (Node *node = object ? object->child : NULL; node; node = node->next)
        if (node->key && !strcmp(node->key, key)) return node;
    return NULL;
}

static double number(const Node *object, const char *key)
{
    const Node *node = find(object, key);
    if (!node || node->kind != 'n') die("manifest.json: %s: expected a number", key);
    return node->number;
}

static const char *text(const Node *object, const char *key)
{
    const Node *node = find(object, key);
    if (!node || node->kind != '"') die("manifest.json: %s: expected a string", key);
    return node->text;
}

/* -- safetensors ------------------------------------------------------------------------------ */

typedef struct {
    size_t size, rank, shape[8];
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
    char *header = reserve(length + 1);
    memcpy(header, file.bytes + 8, length);
    header[length] = 0;
    cursor = header;
    file.header = value();
    file.start = 8 + length;
    free(header);
    return file;
}

/* An absent tensor has no data: the bias of a layer without one. */
static Tensor tensor(const File *file, const char *group, const char *name)
{
    char key[128];
    Tensor t = {1, 0, {0}, NULL};
    snprintf(key, sizeof key, "%s/%s", group, name);
    const Node *entry = find(file->header, key);
    if (!entry) return t;
    for (Node *n = find(entry, "shape")->child; n; n = n->next) {
        if (t.rank == 8) die("%s: too many axes", key);
        t.shape[t.rank++] = (size_t)n->number;
        t.size *= (size_t)n->number;
    }
    int wide = !strcmp(text(entry, "dtype"), "F64");
    size_t start = file->start + (size_t)find(entry, "data_offsets")->child->number;
    if (start + t.size * (wide ? 8 : 4) > file->size) die("%s: outside its file", key);
    t.data = reserve(t.size * sizeof *t.data);
    for (size_t i = 0; i < t.size; i++) {
        float narrow;
        if (wide) {
            memcpy(&t.data[i], file->bytes + start + 8 * i, 8);
        } else {
            memcpy(&narrow, file->bytes + start + 4 * i, 4);
            t.data[i] = narrow;
        }
    }
    return t;
}

/* Inputs are exact in float. */
static float *floats(Tensor t)
{
    if (!t.data) return NULL;
    float *x = reserve(t.size * sizeof *x);
    for (size_t i = 0; i < t.size; i++) x[i] = (float)t.data[i];
    return x;
}

/* -- the operations --------------------------------------------------------------------------- */

typedef struct {
    const char *name;
    float *data;
    size_t size;
} Result;

static float *zeros(size_t n)
{
    float *x = calloc(n ? n : 1, sizeof *x);
    if (!x) die("out of memory");
    return x;
}

/* y = w x / n, n = sqrt(mean(x²) + eps); dx = u/n − x·mean(u x)/n³ with u = dy w; dw = Σ dy x / n */
static size_t rmsnorm(const File *file, const Node *attributes, Result *out)
{
    Tensor shape = tensor(file, "in", "x");
    size_t c = shape.shape[shape.rank - 1], rows = shape.size / c;
    float *x = floats(shape), *w = floats(tensor(file, "in", "w")), *dy = floats(tensor(file, "in", "dy"));
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
                 float *y)
{
    size_t n = shape[0], t = shape[1], h = shape[2], d = shape[3], half = d / 2;
    for (size_t at = 0; at < n * t * h; at++) {
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
    Tensor shape = tensor(file, "in", "x");
    float *x = floats(shape), *dy = floats(tensor(file, "in", "dy"));
    float *c = floats(tensor(file, "in", "cos")), *s = floats(tensor(file, "in", "sin"));
    float *y = zeros(shape.size), *dx = zeros(shape.size);
    turn(x, c, s, 1, shape.shape, y);
    turn(dy, c, s, -1, shape.shape, dx);
    out[0] = (Result){"y", y, shape.size};
    out[1] = (Result){"dx", dx, shape.size};
    return 2;
}

/* h = x Aᵀ, y = x Wᵀ + b + s h Bᵀ; dh = s dy B, dx = dy W + dh A, dA = dhᵀ x, dB = s dyᵀ h */
static size_t lora_linear(const File *file, const Node *attributes, Result *out)
{
    Tensor shape = tensor(file, "in", "x"), wide = tensor(file, "in", "w"), low = tensor(file, "in", "A");
    size_t in = wide.shape[1], o = wide.shape[0], r = low.shape[0], rows = shape.size / in;
    float *x = floats(shape), *w = floats(wide), *b = floats(tensor(file, "in", "b")), *A = floats(low);
    float *B = floats(tensor(file, "in", "B")), *dy = floats(tensor(file, "in", "dy"));
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
    if (!want.data || !mag.data || want.size != got->size) return INFINITY;
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
    for (Node *node = find(entry, "tensors")->child; node; node = node->next)
        if (!strcmp(text(node, "name"), name)) return node;
    die("manifest.json: %s: expected tensor %s", text(entry, "name"), name);
    return NULL;
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
    snprintf(path, sizeof path, "%s/manifest.json", arguments[1]);
    char *manifest_text = read_file(path, &size);
    cursor = manifest_text;
    Node *manifest = value();
    if (strcmp(text(manifest, "format"), "mesp-ref golden suite") || number(manifest, "version") != 1)
        die("%s: expected a golden suite of version 1", path);
    Node *unit = find(find(manifest, "units"), "float32");
    for (Node *entry = find(manifest, "cases")->child; entry; entry = entry->next) {
        const Node *attributes = find(entry, "attributes"), *op = find(attributes, "op");
        for (size_t i = 0; op && i < sizeof OPS / sizeof *OPS; i++) {
            if (strcmp(op->text, OPS[i].op)) continue;
            Result results[4];
            snprintf(path, sizeof path, "%s/%s", arguments[1], text(entry, "file"));
            File file = open_tensors(path);
            size_t found = OPS[i].compute(&file, attributes, results);
            for (size_t j = 0; j < found; j++, tensors++) {
                double share = margin(&results[j], &file, expected_tensor(entry, results[j].name), unit);
                if (!(share <= 1)) wrong++;
                printf("%s %-32s %-3s %6.1f%% of the tolerance\n", share <= 1 ? "ok  " : "FAIL",
                       text(entry, "name"), results[j].name, 100 * share);
            }
        }
    }
    printf("%d of %d tensors agree\n", tensors - wrong, tensors);
    return wrong || !tensors;
}
