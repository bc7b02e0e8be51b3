// The CPU decoder: owns packed weights, the paged key/value cache and work space, and runs forward passes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "decoder_kernels.h"

namespace py = pybind11;

namespace {

using spear::kPage;
using spear::kPanel;
using spear::round_up;
using Floats = py::array_t<float, py::array::c_style>;
using Ints = py::array_t<int32_t, py::array::c_style>;
using Words = py::array_t<uint64_t, py::array::c_style>;

struct Free {
    void operator()(void* pointer) const { std::free(pointer); }
};

template <typename T>
using Buffer = std::unique_ptr<T, Free>;

// Aligned storage. Uncleared storage stays uncommitted until first touched; cleared storage may use huge pages.
template <typename T>
Buffer<T> allocate(int64_t count, bool clear) {
    constexpr size_t huge = size_t{1} << 21;
    const size_t wanted = std::max<size_t>(64, static_cast<size_t>(count) * sizeof(T));
    const size_t alignment = wanted >= huge ? huge : 64;
    const size_t size = (wanted + alignment - 1) / alignment * alignment;
    void* pointer = std::aligned_alloc(alignment, size);
    if (pointer == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (clear && alignment == huge) madvise(pointer, size, MADV_HUGEPAGE);
#endif
    if (clear) std::memset(pointer, 0, size);
    return Buffer<T>(static_cast<T*>(pointer));
}

template <typename Array>
void require_size(const Array& array, int64_t size, const char* name) {
    if (array.size() != size) {
        throw std::invalid_argument(std::string(name) + " must have " + std::to_string(size) + " elements, got " +
                                    std::to_string(array.size()));
    }
}

class Decoder {
   public:
    Decoder(int64_t hidden, int64_t layers, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t intermediate,
            int64_t vocab, bool qkv_bias, bool qk_norm, float norm_eps, const Floats& rope_cos, const Floats& rope_sin,
            int64_t num_pages, int64_t max_rows, int64_t max_outputs, int64_t num_threads, const std::string& isa)
        : max_rows_(max_rows),
          max_outputs_(max_outputs),
          num_threads_(num_threads),
          num_positions_(rope_cos.shape(0)),
          forward_(spear::decoder_forward_for(spear::parse_isa(isa.c_str()))),
          isa_(spear::isa_name(spear::parse_isa(isa.c_str()))) {
        if (num_threads < 1 || max_rows < 1 || max_outputs < 1 || num_pages < 1) {
            throw std::invalid_argument("num_threads, max_rows, max_outputs and num_pages must be positive");
        }
        require_size(rope_cos, num_positions_ * (head_dim / 2), "rope_cos");
        require_size(rope_sin, num_positions_ * (head_dim / 2), "rope_sin");
        call_.shape = {hidden, layers, heads, kv_heads, head_dim, intermediate, vocab, qkv_bias, qk_norm, norm_eps};
        call_.rope_cos = own(rope_cos.data(), rope_cos.size());
        call_.rope_sin = own(rope_sin.data(), rope_sin.size());
        make_weights();
        make_workspace(num_pages);
    }

    // Copies one tensor into its place. `kind` is the last distinguishing part of the Hugging Face name.
    void load(const std::string& kind, int64_t layer, const Floats& values) {
        const auto& s = call_.shape;
        const float* source = values.data();
        const bool global = kind == "embed_tokens" || kind == "norm" || kind == "lm_head";
        if (!global && (layer < 0 || layer >= s.layers))
            throw std::invalid_argument("no layer " + std::to_string(layer));
        if (kind == "embed_tokens") {
            require_size(values, s.vocab * s.hidden, "embed_tokens");
            const int64_t stride = round_up(s.hidden, kPanel);
            for (int64_t v = 0; v < s.vocab; ++v)
                std::copy_n(source + v * s.hidden, s.hidden, call_.weights.embedding + v * stride);
        } else if (kind == "lm_head") {
            pack(values, call_.weights.head, s.hidden, 0, s.vocab);
        } else if (kind == "norm") {
            fill(values, call_.weights.final_norm, s.hidden);
        } else {
            load_layer(kind, layers_[static_cast<size_t>(layer)], values);
        }
    }

    // Forward pass over `ids` (see DecoderBatch); returns (tokens, log_probs) of the output rows.
    py::tuple forward(const Ints& ids, const Ints& slots, const Ints& positions, const Ints& block_table,
                      const Ints& output_rows, const Floats& temperature, const Ints& top_k, const Floats& top_p,
                      const Words& noise_key) {
        const int64_t rows = ids.size(), outputs = output_rows.size();
        if (rows > max_rows_ || outputs > max_outputs_)
            throw std::invalid_argument("more rows or outputs than the decoder has room for");
        require_size(slots, rows, "slots");
        require_size(positions, rows, "positions");
        require_size(temperature, outputs, "temperature");
        require_size(top_k, outputs, "top_k");
        require_size(top_p, outputs, "top_p");
        require_size(noise_key, outputs, "noise_key");
        if (block_table.ndim() != 2) throw std::invalid_argument("block_table must be [slots, pages]");
        check_rows(ids, slots, positions, block_table, output_rows);
        Ints tokens(outputs);
        Floats log_probs(outputs);
        spear::DecoderCall call = call_;
        call.batch = {rows,
                      outputs,
                      block_table.shape(1),
                      ids.data(),
                      slots.data(),
                      positions.data(),
                      block_table.data(),
                      output_rows.data(),
                      temperature.data(),
                      top_p.data(),
                      top_k.data(),
                      noise_key.data(),
                      tokens.mutable_data(),
                      log_probs.mutable_data()};
        {
            py::gil_scoped_release release;
            run(call);
        }
        return py::make_tuple(tokens, log_probs);
    }

    const std::string& isa() const { return isa_; }

   private:
    void run(const spear::DecoderCall& call) const {
#if defined(_OPENMP)
        if (num_threads_ > 1) {
#pragma omp parallel num_threads(static_cast<int>(num_threads_))
            forward_(call, omp_get_thread_num(), omp_get_num_threads());
            return;
        }
#endif
        forward_(call, 0, 1);
    }

    float* own(const float* source, int64_t count) {
        float* target = make(count, true);
        std::copy_n(source, count, target);
        return target;
    }

    float* make(int64_t count, bool clear) {
        owned_.push_back(allocate<float>(count, clear));
        return owned_.back().get();
    }

    float* make_matrix(int64_t columns, int64_t depth) { return make(round_up(columns, kPanel) * depth, true); }

    void make_weights() {
        const auto& s = call_.shape;
        const int64_t hidden = round_up(s.hidden, kPanel);
        layers_.resize(static_cast<size_t>(s.layers));
        for (auto& w : layers_) {
            w.input_norm = make(hidden, true);
            w.qkv = make_matrix(s.qkv_width(), s.hidden);
            w.qkv_bias = make(round_up(s.qkv_width(), kPanel), true);
            w.q_norm = make(round_up(s.head_dim, kPanel), true);
            w.k_norm = make(round_up(s.head_dim, kPanel), true);
            w.output = make_matrix(s.hidden, s.q_width());
            w.post_norm = make(hidden, true);
            w.gate_up = make_matrix(2 * round_up(s.intermediate, kPanel / 2), s.hidden);
            w.down = make_matrix(s.hidden, s.intermediate);
        }
        call_.weights = {make(s.vocab * hidden, true), make(hidden, true), make_matrix(s.vocab, s.hidden),
                         layers_.data()};
    }

    void make_workspace(int64_t num_pages) {
        const auto& s = call_.shape;
        const int64_t hidden = round_up(s.hidden, kPanel), wide = std::max(max_rows_, max_outputs_);
        const int64_t scores = round_up(num_positions_, kPanel), pages = s.layers * num_pages * s.kv_heads;
        auto& w = call_.work;
        call_.cache = {make(pages * s.head_dim * kPage, false), make(pages * s.value_width() * kPage, false),
                       num_pages};
        w.residual = make(wide * hidden, true);
        w.normed = make(wide * hidden, true);
        w.qkv = make(max_rows_ * round_up(s.qkv_width(), kPanel), true);
        w.attention = make(max_rows_ * round_up(s.q_width(), kPanel), true);
        w.activation = make(max_rows_ * round_up(s.intermediate, kPanel), true);
        w.logits = make(max_outputs_ * round_up(s.vocab, kPanel), true);
        w.score_stride = scores;
        w.scratch_stride = std::max(4 * scores, (spear::kRowChunk + 1) * kPanel);
        w.scratch = make(num_threads_ * w.scratch_stride, true);
        w.partial_sums_stride = round_up(s.vocab, spear::kSumChunk) / spear::kSumChunk;
        partial_sums_ = allocate<double>(num_threads_ * w.partial_sums_stride, true);
        w.partial_sums = partial_sums_.get();
    }

    void load_layer(const std::string& kind, const spear::LayerWeights& w, const Floats& values) {
        const auto& s = call_.shape;
        const int64_t q = s.q_width(), kv = s.kv_width();
        if (kind == "input_layernorm") return fill(values, w.input_norm, s.hidden);
        if (kind == "post_attention_layernorm") return fill(values, w.post_norm, s.hidden);
        if (kind == "q_norm") return fill(values, w.q_norm, s.head_dim);
        if (kind == "k_norm") return fill(values, w.k_norm, s.head_dim);
        if (kind == "q_proj.bias") return fill(values, w.qkv_bias, q);
        if (kind == "k_proj.bias") return fill(values, w.qkv_bias + q, kv);
        if (kind == "v_proj.bias") return fill(values, w.qkv_bias + q + kv, kv);
        if (kind == "q_proj") return pack(values, w.qkv, s.hidden, 0, q);
        if (kind == "k_proj") return pack(values, w.qkv, s.hidden, q, kv);
        if (kind == "v_proj") return pack(values, w.qkv, s.hidden, q + kv, kv);
        if (kind == "o_proj") return pack(values, w.output, q, 0, s.hidden);
        if (kind == "gate_proj") return pack_interleaved(values, w.gate_up, 0);
        if (kind == "up_proj") return pack_interleaved(values, w.gate_up, kPanel / 2);
        if (kind == "down_proj") return pack(values, w.down, s.intermediate, 0, s.hidden);
        throw std::invalid_argument("unknown kind of weight '" + kind + "'");
    }

    static void fill(const Floats& values, float* target, int64_t count) {
        require_size(values, count, "vector");
        std::copy_n(values.data(), count, target);
    }

    // Column `column` of a packed matrix takes depth source values.
    static void pack_column(const float* source, float* matrix, int64_t depth, int64_t column) {
        float* target = matrix + column / kPanel * depth * kPanel + column % kPanel;
        for (int64_t k = 0; k < depth; ++k) target[k * kPanel] = source[k];
    }

    static void pack(const Floats& values, float* matrix, int64_t depth, int64_t first, int64_t count) {
        require_size(values, count * depth, "matrix");
        for (int64_t i = 0; i < count; ++i) pack_column(values.data() + i * depth, matrix, depth, first + i);
    }

    // Gate and up columns alternate in runs of half a panel, so that one panel yields finished activations.
    void pack_interleaved(const Floats& values, float* matrix, int64_t offset) const {
        constexpr int64_t half = kPanel / 2;
        const int64_t hidden = call_.shape.hidden, intermediate = call_.shape.intermediate;
        require_size(values, intermediate * hidden, "matrix");
        for (int64_t i = 0; i < intermediate; ++i) {
            pack_column(values.data() + i * hidden, matrix, hidden, i / half * kPanel + offset + i % half);
        }
    }

    void check_rows(const Ints& ids, const Ints& slots, const Ints& positions, const Ints& block_table,
                    const Ints& output_rows) const {
        const int64_t limit = std::min(num_positions_, block_table.shape(1) * kPage);
        for (py::ssize_t i = 0; i < ids.size(); ++i) {
            const int32_t slot = slots.data()[i], position = positions.data()[i];
            const bool placed = slot >= 0 && slot < block_table.shape(0) && position >= 0 && position < limit;
            if (!placed || ids.data()[i] < 0 || ids.data()[i] >= call_.shape.vocab) {
                throw std::invalid_argument("row " + std::to_string(i) + " has a token, slot or position out of range");
            }
            const int32_t* table = block_table.data() + slot * block_table.shape(1);
            // Earlier rows of a chunk vouch for their pages; only the last row of each run looks at all of them.
            const bool last = i + 1 == ids.size() || slots.data()[i + 1] != slot;
            for (int32_t page = last ? 0 : position / kPage; page <= position / kPage; ++page) {
                if (table[page] < 0 || table[page] >= call_.cache.num_pages)
                    throw std::invalid_argument("block_table names an unknown page");
            }
        }
        for (py::ssize_t i = 0; i < output_rows.size(); ++i) {
            if (output_rows.data()[i] < 0 || output_rows.data()[i] >= ids.size())
                throw std::invalid_argument("output_rows names an unknown row");
        }
    }

    int64_t max_rows_, max_outputs_, num_threads_, num_positions_;
    spear::DecoderForward forward_;
    std::string isa_;
    std::vector<Buffer<float>> owned_;
    Buffer<double> partial_sums_;
    std::vector<spear::LayerWeights> layers_;
    spear::DecoderCall call_{};
};

}  // namespace

void register_decoder(py::module_& module) {
    using namespace py::literals;
    py::class_<Decoder>(module, "Decoder", "CPU decoder with packed weights and a paged cache; see kernels.decoder.")
        .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool, float, const Floats&,
                      const Floats&, int64_t, int64_t, int64_t, int64_t, const std::string&>(),
             py::kw_only(), "hidden"_a, "layers"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "intermediate"_a, "vocab"_a,
             "qkv_bias"_a, "qk_norm"_a, "norm_eps"_a, "rope_cos"_a, "rope_sin"_a, "num_pages"_a, "max_rows"_a,
             "max_outputs"_a, "num_threads"_a, "isa"_a)
        .def("load", &Decoder::load, "kind"_a, "layer"_a, "values"_a)
        .def("forward", &Decoder::forward, "ids"_a, "slots"_a, "positions"_a, "block_table"_a, "output_rows"_a,
             "temperature"_a, "top_k"_a, "top_p"_a, "noise_key"_a)
        .def_property_readonly("isa", &Decoder::isa);
    module.attr("DECODER_PAGE") = kPage;
    module.def("keyed_uniform", &spear::keyed_uniform, "key"_a, "position"_a,
               "Uniform in [0, 1) of (key, position), Philox4x32-10.");
}
