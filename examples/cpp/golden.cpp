// A golden client in C++17, standard library only: causal attention, forward and backward, in float.
//
//     c++ -std=c++17 -O2 -o golden golden.cpp && ./golden path/to/suite
//
// Reads manifest.json and the safetensors files of the suite, computes every case of ops/attention
// (grouped heads, earlier keys) and holds the results against `want` within the suite's tolerance. Exit
// code 0: all agree; 1: something differs; 2: the suite cannot be read. Assumes a little-endian machine.

#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using Numbers = std::vector<float>;

[[noreturn]] void fail(const std::string &reason) { throw std::runtime_error(reason); }

// Names come from a file: nothing but printable ASCII reaches a terminal.
std::string printable(std::string text)
{
    for (char &c : text)
        if (c < 32 || c > 126) c = '?';
    return text;
}

// -- JSON ---------------------------------------------------------------------------------------

struct Json {
    enum Kind { Other, Number, Text, List, Object } kind = Other;
    double number = 0;
    std::string text;
    std::vector<Json> items;
    std::map<std::string, Json> members;

    const Json &get(const std::string &key, Kind expected) const
    {
        auto found = members.find(key);
        if (found == members.end() || found->second.kind != expected)
            fail(key + ": missing or of another kind");
        return found->second;
    }
};

class Parser {
public:
    explicit Parser(const std::string &json) : source(json) {}

    Json value(int depth = 0)
    {
        if (depth > 64) fail("JSON: nested too deeply");
        Json found;
        char first = peek();
        if (first == '"') {
            found.kind = Json::Text;
            found.text = text();
        } else if (first == '[') {
            found.kind = Json::List;
            for (at++; peek() != ']';) found.items.push_back(value(depth + 1));
            at++;
        } else if (first == '{') {
            found.kind = Json::Object;
            for (at++; peek() != '}';) {
                std::string key = text();
                found.members[key] = value(depth + 1);
            }
            at++;
        } else {
            std::size_t end = source.find_first_of(" \t\r\n,:]}[{\"", at);
            std::string word = source.substr(at, end == std::string::npos ? end : end - at);
            char *stop = nullptr;
            found.number = std::strtod(word.c_str(), &stop);
            if (!word.empty() && *stop == 0) found.kind = Json::Number;
            else if (word != "true" && word != "false" && word != "null") fail("JSON: expected a value");
            at += word.size();
        }
        return found;
    }

private:
    const std::string &source;
    std::size_t at = 0;

    char peek()
    {
        at = source.find_first_not_of(" \t\r\n,:", at);
        if (at >= source.size()) fail("JSON ends too early");
        return source[at];
    }

    std::string text()
    {
        if (peek() != '"') fail("JSON: expected a text");
        std::string found;
        for (at++; at < source.size() && source[at] != '"'; at++) {
            if (source[at] == '\\') at++; // names hold no other escapes than these
            if (at < source.size()) found += source[at];
        }
        if (at >= source.size()) fail("JSON ends too early");
        at++;
        return found;
    }
};

// A whole number up to `most`: a size or an offset.
std::size_t whole(const Json &json, std::size_t most)
{
    double n = json.number;
    if (json.kind != Json::Number || !(n >= 0 && n <= static_cast<double>(most)) || n != std::floor(n))
        fail("a size or offset is no whole number within the file");
    return static_cast<std::size_t>(n);
}

std::string read(const std::string &path)
{
    std::ifstream file(path, std::ios::binary);
    std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    if (!file.is_open() || file.bad()) fail(path + ": cannot be read");
    return bytes;
}

// -- safetensors --------------------------------------------------------------------------------

struct Tensor {
    std::vector<std::size_t> shape;
    std::vector<double> values; // widened: float32 and float64 both fit

    Numbers narrow() const { return Numbers(values.begin(), values.end()); }
};

using Tensors = std::map<std::string, Tensor>;

template <class Stored> std::vector<double> widened(const char *from, std::size_t count)
{
    std::vector<double> values(count);
    for (std::size_t i = 0; i < count; i++) {
        Stored value;
        std::memcpy(&value, from + i * sizeof value, sizeof value);
        values[i] = static_cast<double>(value);
    }
    return values;
}

Tensors tensors(const std::string &bytes)
{
    std::uint64_t length = 0;
    if (bytes.size() < 8) fail("not a safetensors file");
    std::memcpy(&length, bytes.data(), 8);
    if (length > bytes.size() - 8) fail("truncated");
    const std::string header = bytes.substr(8, static_cast<std::size_t>(length));
    const char *data = bytes.data() + 8 + header.size();
    const std::size_t held = bytes.size() - 8 - header.size();
    Tensors found;
    const Json entries = Parser(header).value();
    for (const auto &[name, entry] : entries.members) {
        if (name == "__metadata__") continue;
        const Json &offsets = entry.get("data_offsets", Json::List);
        if (offsets.items.size() != 2) fail(name + ": expected two offsets");
        const std::size_t start = whole(offsets.items[0], held), stop = whole(offsets.items[1], held);
        std::size_t size = 1;
        const std::string &dtype = entry.get("dtype", Json::Text).text;
        if (dtype != "F32" && dtype != "F64") continue; // integers, which attention does not read
        const std::size_t width = dtype == "F64" ? 8 : 4;
        Tensor tensor;
        for (const Json &axis : entry.get("shape", Json::List).items) {
            std::size_t length_of_axis = whole(axis, held);
            if (length_of_axis && size > held / length_of_axis) fail(name + ": larger than its file");
            size *= length_of_axis;
            tensor.shape.push_back(length_of_axis);
        }
        if (stop < start || stop - start != size * width) fail(name + ": bytes and shape differ");
        tensor.values = width == 8 ? widened<double>(data + start, size) : widened<float>(data + start, size);
        found.emplace(name, std::move(tensor));
    }
    return found;
}

const Tensor &stored(const Tensors &file, const std::string &name)
{
    auto found = file.find(name);
    if (found == file.end()) fail(name + ": missing");
    return found->second;
}

// -- attention ----------------------------------------------------------------------------------

using Results = std::map<std::string, Numbers>;

// q [N, T, H, D], k and v [N, S, G, D]: head h reads key head h/(H/G), query t sees keys up to t + S − T.
// p = softmax(q·k/√D), y = Σ p v;  dv = Σ p dy, ds = p(dy·v − Σ p dy·v), dq = Σ ds k/√D, dk = Σ ds q/√D
Results attention(const Tensors &file)
{
    const Tensor &in_q = stored(file, "in/q"), &in_k = stored(file, "in/k");
    if (in_q.shape.size() != 4 || in_k.shape.size() != 4) fail("attention: expected four axes");
    const std::size_t n = in_q.shape[0], t = in_q.shape[1], heads = in_q.shape[2], d = in_q.shape[3];
    const std::size_t s = in_k.shape[1], groups = in_k.shape[2];
    const Numbers q = in_q.narrow(), k = in_k.narrow();
    const Numbers v = stored(file, "in/v").narrow(), dy = stored(file, "in/dy").narrow();
    if (!groups || heads % groups || s < t || in_k.shape[0] != n || in_k.shape[3] != d
        || v.size() != k.size() || dy.size() != q.size())
        fail("attention: shapes do not fit");
    const float scale = 1 / std::sqrt(static_cast<float>(d));
    Numbers y(q.size()), dq(q.size()), dk(k.size()), dv(k.size()), p(s), dp(s);
    auto dot = [d](const float *a, const float *b) {
        float sum = 0;
        for (std::size_t i = 0; i < d; i++) sum += a[i] * b[i];
        return sum;
    };
    auto add = [d](float *to, float factor, const float *from) {
        for (std::size_t i = 0; i < d; i++) to[i] += factor * from[i];
    };
    for (std::size_t row = 0; row < n * t * heads; row++) {
        const std::size_t batch = row / heads / t, seen = row / heads % t + s - t + 1;
        const std::size_t group = row % heads / (heads / groups), at = row * d;
        auto key = [&](std::size_t j) { return ((batch * s + j) * groups + group) * d; };
        float top = -INFINITY, total = 0, along = 0;
        for (std::size_t j = 0; j < seen; j++) {
            p[j] = dot(&q[at], &k[key(j)]) * scale;
            top = std::fmax(top, p[j]);
        }
        for (std::size_t j = 0; j < seen; j++) total += p[j] = std::exp(p[j] - top);
        for (std::size_t j = 0; j < seen; j++) {
            p[j] /= total;
            dp[j] = dot(&dy[at], &v[key(j)]);
            along += p[j] * dp[j];
            add(&y[at], p[j], &v[key(j)]);
            add(&dv[key(j)], p[j], &dy[at]);
        }
        for (std::size_t j = 0; j < seen; j++) {
            const float ds = p[j] * (dp[j] - along) * scale;
            add(&dq[at], ds, &k[key(j)]);
            add(&dk[key(j)], ds, &q[at]);
        }
    }
    return {{"y", y}, {"dq", dq}, {"dk", dk}, {"dv", dv}};
}

// -- the check ----------------------------------------------------------------------------------

// Largest error as a share of the tolerance; infinite where a value is not finite.
double margin(const Json &entry, const Numbers &got, const Tensors &file, const Json &unit)
{
    const std::string &name = entry.get("name", Json::Text).text;
    const auto &want = stored(file, "want/" + name).values, &mag = stored(file, "mag/" + name).values;
    if (want.size() != got.size() || mag.size() != got.size()) fail(name + ": of another size");
    const double s = entry.get("s", Json::Number).number, k = entry.get("k", Json::Number).number;
    const double relative = s * unit.get("store", Json::Number).number
                          + 4 * std::sqrt(k) * unit.get("sum", Json::Number).number;
    const double smallest = s * unit.get("eta", Json::Number).number;
    double worst = 0;
    for (std::size_t i = 0; i < got.size(); i++) {
        const double error = std::fabs(static_cast<double>(got[i]) - want[i]);
        const double allowed = relative * mag[i] + smallest;
        const bool judged = std::isfinite(error) && allowed > 0;
        worst = std::fmax(worst, error == 0 ? 0 : judged ? error / allowed : INFINITY);
    }
    return worst;
}

bool run(const std::string &root)
{
    const std::string text = read(root + "/manifest.json");
    const Json manifest = Parser(text).value();
    const Json &unit = manifest.get("units", Json::Object).get("float32", Json::Object);
    std::size_t agree = 0, all = 0;
    for (const Json &entry : manifest.get("cases", Json::List).items) {
        const std::string &name = entry.get("name", Json::Text).text;
        if (name.rfind("ops/attention/", 0) != 0) continue;
        const std::string &path = entry.get("file", Json::Text).text;
        if (path.empty() || path[0] == '/' || path.find("..") != path.npos || path.find('\\') != path.npos)
            fail(path + ": leads out of the suite");
        const Tensors file = tensors(read(root + "/" + path));
        const Results results = attention(file);
        double worst = 0;
        for (const Json &tensor : entry.get("tensors", Json::List).items) {
            auto got = results.find(tensor.get("name", Json::Text).text);
            if (got == results.end()) fail(name + ": an unknown tensor is expected");
            const double share = margin(tensor, got->second, file, unit);
            worst = std::fmax(worst, share);
            agree += share <= 1;
            all++;
        }
        std::printf("%s %s (%.3f of the tolerance)\n", worst <= 1 ? "ok  " : "FAIL",
                    printable(name).c_str(), worst);
    }
    std::printf("%zu of %zu tensors agree\n", agree, all);
    return all && agree == all;
}

} // namespace

int main(int count, char **words)
{
    if (count != 2) {
        std::fprintf(stderr, "usage: golden path/to/suite\n");
        return 2;
    }
    try {
        return run(words[1]) ? 0 : 1;
    } catch (const std::exception &error) {
        std::fprintf(stderr, "golden: %s\n", printable(error.what()).c_str());
        return 2;
    }
}
