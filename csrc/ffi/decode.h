// From an FFI call to FwdParams / BwdParams. Arguments come packed: slot i of slots.def is there
// when bit i of the attribute `present` is set. Python has checked shapes against one another; what
// is checked here is what a program exported by another version could get wrong: ranks, dtypes,
// counts and every extent that an index relies on.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "../attention/params.h"
#include "status.h"

namespace flashjax {

enum class SlotType { T, F, F32, S32 };

struct SlotInfo {
  const char* name;
  SlotType type;
  const char* dims;
};

inline constexpr SlotInfo kSlots[] = {
#define SLOT(name, type, dims) {#name, SlotType::type, dims},
#include "../attention/slots.def"
#undef SLOT
};

enum Slot : int {
#define SLOT(name, type, dims) k_##name,
#include "../attention/slots.def"
#undef SLOT
  kSlotCount
};

// Attributes that describe the call itself, next to those of attrs.def:
//   present  bit i: slot i is among the arguments
//   wanted   bit i: the backward also returns the gradient of slot i (bias, sinks)
struct Call {
  std::array<std::optional<ffi::AnyBuffer>, kSlotCount> slot;
  int64_t wanted = 0;
  bool wants(Slot i) const { return (wanted >> i) & 1; }
};

inline std::optional<DType> dtype_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32:
      return DType::kF32;
    case ffi::DataType::BF16:
      return DType::kBF16;
    case ffi::DataType::F16:
      return DType::kF16;
    default:
      return std::nullopt;
  }
}

inline int slot_rank(const SlotInfo& slot) {
  int rank = 1;
  for (const char* c = slot.dims; *c; ++c) rank += *c == ' ';
  return rank;
}

inline ffi::Error decode_call(const ffi::RemainingArgs& args, const ffi::Dictionary& attrs,
                              Call& call) {
  auto present = attrs.get<int64_t>("present");
  auto wanted = attrs.get<int64_t>("wanted");
  if (!present.has_value()) return present.error();
  if (!wanted.has_value()) return wanted.error();
  call.wanted = *wanted;
  size_t next = 0;
  for (int i = 0; i < kSlotCount; ++i) {
    if (!((*present >> i) & 1)) continue;
    if (next >= args.size()) return InvalidArgument("fewer arguments than `present` says");
    auto buffer = args.get<ffi::AnyBuffer>(next++);
    if (!buffer.has_value()) return buffer.error();
    if (static_cast<int>(buffer->dimensions().size()) != slot_rank(kSlots[i]))
      return InvalidArgument(std::string("`") + kSlots[i].name + "` has the wrong rank");
    call.slot[i] = *buffer;
  }
  if (next != args.size()) return InvalidArgument("more arguments than `present` says");
  return ffi::Error::Success();
}

// Binds each dimension letter to the extent seen first, and refuses any other (1 where the slot
// says `?`). Letters in `free` may have any extent.
class Extents {
 public:
  ffi::Error bind(const SlotInfo& slot, ffi::Span<const int64_t> dims, std::string_view free = "") {
    size_t i = 0;
    for (const char* c = slot.dims; *c; ++c) {
      if (*c == ' ' || *c == '?' || *c == '1') continue;
      bool plus_one = c[1] == '1', may_be_one = c[1] == '?';
      int64_t extent = dims[i++] - plus_one;
      if ((may_be_one && extent == 1) || free.find(*c) != free.npos) continue;
      if (extent < 0) return InvalidArgument(std::string("`") + slot.name + "` has too few rows");
      int64_t& bound = extent_[static_cast<unsigned char>(*c)];
      if (bound < 0) bound = extent;
      if (bound != extent)
        return InvalidArgument(std::string("`") + slot.name + "` (" + slot.dims + ") has " + *c +
                               " = " + std::to_string(extent) + ", elsewhere it is " +
                               std::to_string(bound));
    }
    return ffi::Error::Success();
  }
  int64_t operator()(char letter, int64_t absent = 0) const {
    int64_t x = extent_[static_cast<unsigned char>(letter)];
    return x < 0 ? absent : x;
  }
  void set(char letter, int64_t extent) { extent_[static_cast<unsigned char>(letter)] = extent; }
  Extents() { extent_.fill(-1); }

 private:
  std::array<int64_t, 128> extent_;
};

template <int kRank>
Broadcast<kRank> broadcast_of(ffi::Span<const int64_t> dims) {
  Broadcast<kRank> shape;
  int64_t stride = 1;
  for (int i = kRank - 1; i >= 0; --i) {
    shape.dim[i] = dims[i];
    shape.stride[i] = dims[i] == 1 ? 0 : stride;
    stride *= dims[i];
  }
  return shape;
}

inline ffi::Error decode_problem(const Call& call, const ffi::Dictionary& attrs, Problem& p) {
  // Values that are columns of the keys do not come again.
  auto shared_e = attrs.get<int64_t>("shared_e");
  if (!shared_e.has_value()) return shared_e.error();
  const bool shared = *shared_e > 0;
  for (Slot i : {k_q, k_k, k_v})
    if (!call.slot[i] && !(i == k_v && shared))
      return InvalidArgument(std::string("`") + kSlots[i].name + "` is missing");
  if (shared && call.slot[k_v]) return InvalidArgument("`v` comes twice");
  bool paged = call.slot[k_page_table].has_value();
  bool indirect = paged || call.slot[k_batch_idx].has_value();

  auto operand = dtype_of(call.slot[k_q]->element_type());
  if (!operand) return InvalidArgument("`q` must be float32, bfloat16 or float16");
  p.dtype = *operand;

  Extents extents;
  for (int i = 0; i < kSlotCount; ++i) {
    if (!call.slot[i]) continue;
    const ffi::AnyBuffer& x = *call.slot[i];
    const SlotInfo& slot = kSlots[i];
    auto type = dtype_of(x.element_type());
    bool ok = slot.type == SlotType::S32   ? x.element_type() == ffi::DataType::S32
              : slot.type == SlotType::F32 ? type == DType::kF32
              : slot.type == SlotType::T   ? type == p.dtype
                                           : type == p.dtype || type == DType::kF32;
    if (!ok) return InvalidArgument(std::string("`") + slot.name + "` has the wrong dtype");
    if (paged && i == k_segment_ids_k) return InvalidArgument("segment ids do not go with pages");
    // A bias goes by positions within a sequence, and a packed sequence is shorter than its row. Of
    // other rows it may have more keys than there are, which are never read.
    bool positions = call.slot[k_cu_seqlens_q] || call.slot[k_cu_seqlens_k];
    const char* free = i != k_bias ? "" : positions ? "st" : "t";
    FLASHJAX_RETURN_IF_ERROR(extents.bind(slot, x.dimensions(), free));
  }
  if (!call.slot[k_cu_seqlens_q] && !call.slot[k_cu_seqlens_k]) {
    if (extents('n', 1) != 1) return InvalidArgument("n > 1 needs cu_seqlens");
    extents.set('n', 1);
  }
  p.b = extents('b'), p.s = extents('s'), p.h = extents('h'), p.g = extents('g');
  p.d = extents('d'), p.e = shared ? *shared_e : extents('e'), p.c = extents('c'),
  p.n = extents('n', 1);
  p.t = extents('t');
  if (p.e > p.d && shared) return InvalidArgument("`k` has fewer columns than the values");
  if (paged) p.p = extents('p'), p.page = p.t, p.t = p.p * p.page;
  if (!indirect && p.c != p.b) return InvalidArgument("`k` has another batch size than `q`");
  if (p.g == 0 ? p.h != 0 : p.h % p.g != 0)
    return InvalidArgument("the query heads are no multiple of the key heads");

  auto data = [&](Slot i) -> const void* {
    return call.slot[i] ? call.slot[i]->untyped_data() : nullptr;
  };
  auto f32 = [&](Slot i) { return static_cast<const float*>(data(i)); };
  auto s32 = [&](Slot i) { return static_cast<const int32_t*>(data(i)); };
  p.q = data(k_q), p.k = data(k_k), p.v = shared ? p.k : data(k_v);
  p.bias = data(k_bias), p.alibi_slopes = f32(k_alibi_slopes), p.sinks = f32(k_sinks);
  p.segment_ids_q = s32(k_segment_ids_q), p.segment_ids_k = s32(k_segment_ids_k);
  p.cu_seqlens_q = s32(k_cu_seqlens_q), p.cu_seqlens_k = s32(k_cu_seqlens_k);
  p.seqused_q = s32(k_seqused_q), p.seqused_k = s32(k_seqused_k);
  p.leftpad = s32(k_leftpad), p.batch_idx = s32(k_batch_idx), p.page_table = s32(k_page_table),
  p.shift = s32(k_shift), p.dropout_seed = s32(k_dropout_seed);
  if (p.dropout_seed && extents('w') != 2)
    return InvalidArgument("`dropout_seed` has the wrong number of words");
  if (!p.segment_ids_q != !p.segment_ids_k)
    return InvalidArgument("`segment_ids_q` and `segment_ids_k` come together");
  if (p.bias) {
    p.bias_shape = broadcast_of<5>(call.slot[k_bias]->dimensions());
    const int64_t keys = p.bias_shape.dim[4];
    if (!call.slot[k_cu_seqlens_q] && !call.slot[k_cu_seqlens_k] && keys != 1 && keys < p.t)
      return InvalidArgument("`bias` has t = " + std::to_string(keys) + ", elsewhere it is " +
                             std::to_string(p.t));
    p.bias_dtype = *dtype_of(call.slot[k_bias]->element_type());
  }
  if (p.alibi_slopes) p.alibi_shape = broadcast_of<2>(call.slot[k_alibi_slopes]->dimensions());
  if (p.sinks) p.sinks_shape = broadcast_of<2>(call.slot[k_sinks]->dimensions());

#define ATTR(name, type)                          \
  {                                               \
    auto value = attrs.get<type>(#name);          \
    if (!value.has_value()) return value.error(); \
    p.name = *value;                              \
  }
#include "../attention/attrs.def"
#undef ATTR
  if (p.dropout_seed && (p.dropout_keep < 1 || p.dropout_keep > 256))
    return InvalidArgument("`dropout_keep` must be from 1 to 256");
  return ffi::Error::Success();
}

// Results come in the order out, lse[, workspace]; each must be as large as the kernel will write.
class Results {
 public:
  explicit Results(const ffi::RemainingRets& rets) : rets_(rets) {}
  // The next result, which must hold `count` elements of `type`.
  ffi::Error next(const char* name, ffi::DataType type, int64_t count, void*& data) {
    if (next_ >= rets_.size()) return InvalidArgument(std::string("no result `") + name + "`");
    auto buffer = rets_.get<ffi::AnyBuffer>(next_++);
    if (!buffer.has_value()) return buffer.error();
    if ((*buffer)->element_type() != type ||
        static_cast<int64_t>((*buffer)->element_count()) != count)
      return InvalidArgument(std::string("result `") + name + "` has the wrong dtype or size");
    data = (*buffer)->untyped_data();
    return ffi::Error::Success();
  }
  // Whether the next one has this dtype.
  bool is_next(ffi::DataType type) const {
    if (next_ >= rets_.size()) return false;
    auto buffer = rets_.get<ffi::AnyBuffer>(next_);
    return buffer.has_value() && (*buffer)->element_type() == type;
  }
  // The workspace: whatever is left.
  ffi::Error workspace(void*& data, int64_t& bytes) {
    if (next_ == rets_.size()) return ffi::Error::Success();
    auto buffer = rets_.get<ffi::AnyBuffer>(next_++);
    if (!buffer.has_value()) return buffer.error();
    data = (*buffer)->untyped_data();
    bytes = static_cast<int64_t>((*buffer)->size_bytes());
    if (next_ != rets_.size()) return InvalidArgument("too many results");
    return ffi::Error::Success();
  }

 private:
  const ffi::RemainingRets& rets_;
  size_t next_ = 0;
};

inline int64_t elements(const ffi::AnyBuffer& x) { return static_cast<int64_t>(x.element_count()); }

inline ffi::Error decode_fwd(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                             const ffi::Dictionary& attrs, FwdParams& p) {
  Call call;
  FLASHJAX_RETURN_IF_ERROR(decode_call(args, attrs, call));
  FLASHJAX_RETURN_IF_ERROR(decode_problem(call, attrs, p));
  Results results(rets);
  void* lse = nullptr;
  FLASHJAX_RETURN_IF_ERROR(
      results.next("out", call.slot[k_q]->element_type(), p.b * p.s * p.h * p.e, p.out));
  FLASHJAX_RETURN_IF_ERROR(results.next("lse", ffi::DataType::F32, p.b * p.h * p.s, lse));
  p.lse = static_cast<float*>(lse);
  return results.workspace(p.workspace, p.workspace_bytes);
}

// Results: dq, dk, dv[, dbias][, dsinks][, workspace].
inline ffi::Error decode_bwd(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                             const ffi::Dictionary& attrs, BwdParams& p) {
  Call call;
  FLASHJAX_RETURN_IF_ERROR(decode_call(args, attrs, call));
  FLASHJAX_RETURN_IF_ERROR(decode_problem(call, attrs, p));
  for (Slot i : {k_v, k_out, k_lse, k_dout, k_dlse})
    if (!call.slot[i]) return InvalidArgument(std::string("`") + kSlots[i].name + "` is missing");
  p.out = call.slot[k_out]->untyped_data(), p.dout = call.slot[k_dout]->untyped_data();
  p.lse = call.slot[k_lse]->typed_data<float>(),
  p.dlse = p.out_only ? nullptr : call.slot[k_dlse]->typed_data<float>();
  Results results(rets);
  auto type = call.slot[k_q]->element_type();
  FLASHJAX_RETURN_IF_ERROR(results.next("dq", type, elements(*call.slot[k_q]), p.dq));
  FLASHJAX_RETURN_IF_ERROR(results.next("dk", type, elements(*call.slot[k_k]), p.dk));
  FLASHJAX_RETURN_IF_ERROR(results.next("dv", type, elements(*call.slot[k_v]), p.dv));
  for (auto [slot, data] : {std::pair{k_bias, &p.dbias}, std::pair{k_sinks, &p.dsinks}}) {
    if (!call.wants(slot)) continue;
    if (!call.slot[slot])
      return InvalidArgument(std::string("gradient of an absent `") + kSlots[slot].name + "`");
    const bool half = slot == k_bias && p.dtype != DType::kF32 && p.bias_dtype == p.dtype &&
                      results.is_next(type);
    void* grad = nullptr;
    FLASHJAX_RETURN_IF_ERROR(results.next("gradient", half ? type : ffi::DataType::F32,
                                          elements(*call.slot[slot]), grad));
    if (half)
      p.dbias16 = grad;
    else
      *data = static_cast<float*>(grad);
  }
  return results.workspace(p.workspace, p.workspace_bytes);
}

}  // namespace flashjax
