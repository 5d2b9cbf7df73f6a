// XLA custom calls on CPUs: channel selection, the dense convolution and batch normalisation, each
// forward and backward. See selection.h, dense.h and norm.h.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CHANSEL_X86 1
#endif

#define CHANSEL_INLINE inline __attribute__((always_inline))
#define CHANSEL_UNROLL _Pragma("GCC unroll 16")

namespace chansel {

constexpr int64_t kTileBytes = 256 << 10;  // well within a core's second-level cache
constexpr int64_t kLinesBytes = 24 << 10;  // of an image, read again for each block of a kernel
// Arrays from this size on are written past the caches where whole lines of kLineBytes are computed
// at once: they would not stay there until they are read, and a line that is written into the cache
// is read first.
constexpr int64_t kStreamedBytes = 4 << 20, kLineBytes = 64;
constexpr int64_t kUnits = 64;  // of work, if there is so much: enough for many threads
// Groups of images, each with sums of its own for the kernels' gradients: enough to keep many
// threads busy, but not so many that adding them up takes longer than computing them.
constexpr int64_t kFewestGroups = 8, kMostGroups = 64, kPartialBytes = 8 << 20;

inline int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// For any sign of the dividend.
inline int64_t CeilDiv(int64_t dividend, int64_t divisor) {
  return dividend > 0 ? (dividend + divisor - 1) / divisor : -(-dividend / divisor);
}

// All sizes of a layer; see native/__init__.py. The dense convolution has the rank 1.
struct Geometry {
  int64_t n, h, w, in, rank, out;
  int64_t kernel_h, kernel_w, out_h, out_w;
  int64_t stride_h, stride_w, top, left, dilation_h, dilation_w;

  int64_t InputSize() const { return h * w * in; }
  int64_t OutputSize() const { return out_h * out_w * out; }

  // The columns of a tile of input rows: those that any tap reads, and those of the image.
  int64_t TileWidth() const {
    return std::max((out_w - 1) * stride_w + (kernel_w - 1) * dilation_w + 1, left + w);
  }

  // How far the columns of the output's gradient are moved to the right in its tile, so that every
  // tap of every pixel finds a column, and the columns of that tile.
  int64_t GradientLeft() const {
    return std::max<int64_t>(0, CeilDiv((kernel_w - 1) * dilation_w - left, stride_w));
  }
  int64_t GradientWidth() const {
    return GradientLeft() + std::max(out_w, CeilDiv(w + left, stride_w));
  }

  // Input rows that so many rows of outputs read, from row first * stride_h - top on.
  int64_t InputRows(int64_t outputs) const {
    return (outputs - 1) * stride_h + (kernel_h - 1) * dilation_h + 1;
  }

  // Output rows that are computed at once, so that the tile that they read stays in cache.
  int64_t OutputRowsPerUnit(int64_t tile_bytes, int64_t row_bytes) const {
    int64_t rows = (tile_bytes / row_bytes - (kernel_h - 1) * dilation_h) / stride_h;
    return std::clamp(rows, std::min<int64_t>(4, out_h), out_h);
  }

  // The first output row that input rows from `first` on meet, and the end of those that input rows
  // before `end` meet.
  int64_t FirstOutput(int64_t first) const {
    return std::max<int64_t>(0, CeilDiv(first + top - (kernel_h - 1) * dilation_h, stride_h));
  }
  int64_t EndOfOutputs(int64_t end) const {
    return std::min(out_h, (end - 1 + top) / stride_h + 1);
  }

  // The output row that reads input row `row` by row `a` of the kernel, or -1.
  int64_t OutputRow(int64_t row, int64_t a) const {
    int64_t offset = row + top - a * dilation_h;
    bool meets = offset >= 0 && offset % stride_h == 0 && offset / stride_h < out_h;
    return meets ? offset / stride_h : -1;
  }
};

// The rows of all images in units of work, of so many rows each.
struct RowUnits {
  int64_t images, height, rows;

  struct Unit {
    int64_t image, first, end;
  };

  int64_t PerImage() const { return CeilDiv(height, std::max<int64_t>(1, rows)); }
  int64_t Count() const { return images * PerImage(); }
  Unit At(int64_t unit) const {
    int64_t first = unit % PerImage() * rows;
    return {unit / PerImage(), first, std::min(first + rows, height)};
  }
};

struct BFloat16 {
  uint16_t bits;
};

CHANSEL_INLINE float ToCompute(float value) { return value; }
CHANSEL_INLINE double ToCompute(double value) { return value; }
CHANSEL_INLINE float ToCompute(BFloat16 value) {
  uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

template <typename S, typename C>
CHANSEL_INLINE S ToStorage(C value) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (value != value) return {uint16_t((bits >> 16) | 0x40)};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // round to nearest even
  } else {
    return value;
  }
}

// Memory that begins where a line of the cache does: a vector that lies across two of them is read
// and written half as fast.
template <typename C>
struct Aligned {
  using value_type = C;
  static constexpr std::align_val_t kLine{kLineBytes};

  Aligned() = default;
  template <typename Other>
  Aligned(const Aligned<Other>&) {}

  C* allocate(std::size_t count) {
    if (count > std::size_t(-1) / sizeof(C)) throw std::bad_alloc();
    return static_cast<C*>(::operator new(count * sizeof(C), kLine));
  }
  void deallocate(C* from, std::size_t) { ::operator delete(from, kLine); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};

template <typename C>
using Buffer = std::vector<C, Aligned<C>>;

template <typename C>
C* Grow(Buffer<C>& buffer, int64_t count) {
  if (int64_t(buffer.size()) < count) buffer.resize(count);
  return buffer.data();
}

// Calls body with both as constants.
template <typename Body>
void WithFlags(bool first, bool second, const Body& body) {
  if (first && second) return body(std::true_type(), std::true_type());
  if (first) return body(std::true_type(), std::false_type());
  if (second) return body(std::false_type(), std::true_type());
  return body(std::false_type(), std::false_type());
}

// What a thread keeps from one unit of work to the next, so that no memory is asked for in between.
template <typename C>
struct Scratch {
  Buffer<C> image, sums, line, output_gradient, sums_gradient, image_gradient;
  Buffer<const C*> rows;
};

template <typename C>
Scratch<C>& ThreadScratch() {
  static thread_local Scratch<C> scratch;
  return scratch;
}

// What was written past the caches is seen by all threads that see what this one does next.
inline void FenceStreams() {
#ifdef CHANSEL_X86
  __builtin_ia32_sfence();
#endif
}

// Runs task(0) ... task(count - 1) on XLA's threads and on the calling one. Each takes a range of
// its own, so that it goes on where it was in memory, then what others have not begun. The caller
// takes part, and waits for nothing but tasks that another thread has already begun: it cannot
// starve, even if every other thread of the pool waits for something else. A task can fail only for
// want of memory; the others are then left out, and std::bad_alloc is thrown once no thread is at
// work any more.
class Parallel {
 public:
  explicit Parallel(ffi::ThreadPool pool) : pool_(pool) {}

  void operator()(int64_t count, const std::function<void(int64_t)>& task) const {
    struct alignas(kLineBytes) Range {
      std::atomic<int64_t> next{0};
      int64_t end = 0;
    };
    struct Shared {
      std::function<void(int64_t)> task;
      int64_t count;
      std::vector<Range> ranges;
      std::atomic<int64_t> workers{0}, done{0};
      std::atomic<bool> failed{false};
      std::mutex mutex;
      std::condition_variable all_done;

      Shared(const std::function<void(int64_t)>& task, int64_t count, int64_t threads)
          : task(task), count(count), ranges(threads) {
        for (int64_t i = 0; i < threads; ++i) {
          ranges[i].next = i * count / threads;
          ranges[i].end = (i + 1) * count / threads;
        }
      }

      void Work() {
        int64_t mine = 0;
        for (int64_t first = workers.fetch_add(1), i = 0; i < int64_t(ranges.size()); ++i) {
          Range& range = ranges[(first + i) % ranges.size()];
          for (int64_t at; (at = range.next.fetch_add(1)) < range.end; ++mine) {
            try {
              if (!failed) task(at);
            } catch (...) {
              failed = true;
            }
          }
        }
        FenceStreams();
        if (mine && done.fetch_add(mine) + mine == count) {
          std::lock_guard<std::mutex> lock(mutex);
          all_done.notify_one();
        }
      }
    };
    int64_t threads = std::max<int64_t>(1, std::min(pool_.num_threads(), count));
    auto shared = std::make_shared<Shared>(task, count, threads);
    try {
      for (int64_t i = 1; i < threads; ++i) pool_.Schedule([shared] { shared->Work(); });
    } catch (const std::bad_alloc&) {
      // Those that could be scheduled, and the caller, do it all.
    }
    shared->Work();
    std::unique_lock<std::mutex> lock(shared->mutex);
    shared->all_done.wait(lock, [&] { return shared->done.load() == count; });
    if (shared->failed) throw std::bad_alloc();
  }

 private:
  mutable ffi::ThreadPool pool_;
};

}  // namespace chansel

// The same kernels for each instruction set that a machine may have.
#ifdef CHANSEL_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,prefer-vector-width=512")
#define CHANSEL_TARGET avx512
#define CHANSEL_VECTOR_BYTES 64
namespace chansel {
#include "products.h"
#include "selection.h"
#include "dense.h"
#include "norm.h"
}
#undef CHANSEL_TARGET
#undef CHANSEL_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define CHANSEL_TARGET avx2
#define CHANSEL_VECTOR_BYTES 32
namespace chansel {
#include "products.h"
#include "selection.h"
#include "dense.h"
#include "norm.h"
}
#undef CHANSEL_TARGET
#undef CHANSEL_VECTOR_BYTES
#pragma GCC pop_options
#endif

#define CHANSEL_TARGET baseline
#define CHANSEL_VECTOR_BYTES 16
namespace chansel {
#include "products.h"
#include "selection.h"
#include "dense.h"
#include "norm.h"
}

namespace chansel {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

InstructionSet BestInstructionSet() {
#ifdef CHANSEL_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
    return InstructionSet::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return InstructionSet::kAvx2;
  }
#endif
  return InstructionSet::kBaseline;
}

std::atomic<InstructionSet> instruction_set{BestInstructionSet()};

template <typename Function512, typename Function2, typename FunctionBase>
void Dispatch(Function512 with_avx512, Function2 with_avx2, FunctionBase with_baseline) {
  switch (instruction_set.load(std::memory_order_relaxed)) {
    case InstructionSet::kAvx512:
      return with_avx512();
    case InstructionSet::kAvx2:
      return with_avx2();
    case InstructionSet::kBaseline:
      return with_baseline();
  }
}

#ifdef CHANSEL_X86
#define CHANSEL_CALL(...)                                              \
  Dispatch([&] { avx512::__VA_ARGS__; }, [&] { avx2::__VA_ARGS__; },   \
           [&] { baseline::__VA_ARGS__; })
#else
#define CHANSEL_CALL(...) baseline::__VA_ARGS__
#endif

using Numbers = ffi::Span<const int64_t>;

constexpr char kMisfit[] =
    "x, pointwise and depthwise must be (N, H, W, C_in), (C_in, C_out*R) and (K_h, K_w, R, C_out)";

// `kernel` is (K_h, K_w, ..., C_out).
Geometry MakeGeometry(const ffi::AnyBuffer& x, const ffi::AnyBuffer& kernel, int64_t rank,
                      const ffi::AnyBuffer& y, Numbers strides, Numbers padding,
                      Numbers dilation) {
  auto xs = x.dimensions(), ks = kernel.dimensions(), ys = y.dimensions();
  return {xs[0], xs[1],      xs[2],      xs[3],      rank,       ks[3],       ks[0],      ks[1],
          ys[1], ys[2], strides[0], strides[1], padding[0], padding[1], dilation[0], dilation[1]};
}

using Buffers = std::initializer_list<const ffi::AnyBuffer*>;

// Whether all `of_pixels` are as x (those of `optional` may be empty), all `of_channels` (C).
bool NormFit(const ffi::AnyBuffer& x, Buffers of_pixels, Buffers optional, Buffers of_channels) {
  auto shape = x.dimensions();
  if (shape.size() == 0 || x.element_count() == 0) return false;
  auto dtype = x.element_type(), sums = dtype == ffi::BF16 ? ffi::F32 : dtype;
  auto fits = [&](const ffi::AnyBuffer* each) {
    return each->element_type() == dtype && each->element_count() == x.element_count();
  };
  auto may_be_empty = [&](const ffi::AnyBuffer* each) {
    return each->element_count() == 0 || fits(each);
  };
  auto is_of_channels = [&](const ffi::AnyBuffer* each) {
    return each->element_type() == sums &&
           int64_t(each->element_count()) == shape[shape.size() - 1];
  };
  return std::all_of(of_pixels.begin(), of_pixels.end(), fits) &&
         std::all_of(optional.begin(), optional.end(), may_be_empty) &&
         std::all_of(of_channels.begin(), of_channels.end(), is_of_channels);
}

// Mean and variance of y are wanted where they are not empty.
bool MomentsFit(const ffi::AnyBuffer& y, const ffi::AnyBuffer& mean,
                const ffi::AnyBuffer& variance) {
  bool wanted = mean.element_count() || variance.element_count();
  return !wanted || NormFit(y, {}, {}, {&mean, &variance});
}

// What keeps the kernels within the buffers; the sizes of y follow from the window in Python.
bool Fit(const ffi::AnyBuffer& x, const ffi::AnyBuffer& pointwise, const ffi::AnyBuffer& depthwise,
         const ffi::AnyBuffer& y) {
  auto xs = x.dimensions(), ps = pointwise.dimensions(), ks = depthwise.dimensions(),
       ys = y.dimensions();
  return xs.size() == 4 && ps.size() == 2 && ks.size() == 4 && ys.size() == 4 && ps[0] == xs[3] &&
         ps[1] == ks[2] * ks[3] && ps[1] > 0 && ys[0] == xs[0] && ys[3] == ks[3];
}

// Calls run with a value of the storage type and one of the type of computation.
template <typename Run>
ffi::Error ForDtype(ffi::DataType dtype, const Run& run) {
  try {
    switch (dtype) {
      case ffi::F32:
        run(float(), float());
        return ffi::Error::Success();
      case ffi::F64:
        run(double(), double());
        return ffi::Error::Success();
      case ffi::BF16:
        run(BFloat16(), float());
        return ffi::Error::Success();
      default:
        return ffi::Error::InvalidArgument("dtype must be float32, float64 or bfloat16");
    }
  } catch (const std::exception&) {
    // No exception may reach XLA. Memory is all that can be wanting: std::bad_alloc, or
    // std::length_error where a buffer would be larger than any can be.
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "the computation ran out of memory");
  }
}

template <typename S>
S* Data(const ffi::AnyBuffer& buffer) {
  return static_cast<S*>(buffer.untyped_data());
}

// Null of an empty one.
template <typename S>
S* DataIfAny(const ffi::AnyBuffer& buffer) {
  return buffer.element_count() ? Data<S>(buffer) : nullptr;
}

ffi::Error ForwardHandler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer pointwise,
                          ffi::AnyBuffer depthwise, ffi::Result<ffi::AnyBuffer> y,
                          ffi::Result<ffi::AnyBuffer> mean, ffi::Result<ffi::AnyBuffer> variance,
                          Numbers strides, Numbers padding, Numbers dilation) {
  if (!Fit(x, pointwise, depthwise, *y) || !MomentsFit(*y, *mean, *variance)) {
    return ffi::Error::InvalidArgument(kMisfit);
  }
  Geometry g =
      MakeGeometry(x, depthwise, depthwise.dimensions()[2], *y, strides, padding, dilation);
  return ForDtype(x.element_type(), [&](auto storage, auto compute) {
    using S = decltype(storage);
    using C = decltype(compute);
    CHANSEL_CALL(SelectionForward<S, C>(g, Data<S>(x), Data<S>(pointwise), Data<S>(depthwise),
                                        Data<S>(*y), DataIfAny<C>(*mean), DataIfAny<C>(*variance),
                                        Parallel(pool)));
  });
}

ffi::Error BackwardHandler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer pointwise,
                           ffi::AnyBuffer depthwise, ffi::AnyBuffer dy,
                           ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> dpointwise,
                           ffi::Result<ffi::AnyBuffer> ddepthwise, Numbers strides,
                           Numbers padding, Numbers dilation) {
  if (!Fit(x, pointwise, depthwise, dy)) return ffi::Error::InvalidArgument(kMisfit);
  Geometry g =
      MakeGeometry(x, depthwise, depthwise.dimensions()[2], dy, strides, padding, dilation);
  return ForDtype(x.element_type(), [&](auto storage, auto compute) {
    using S = decltype(storage);
    using C = decltype(compute);
    CHANSEL_CALL(SelectionBackward<S, C>(g, Data<S>(x), Data<S>(pointwise), Data<S>(depthwise),
                                         Data<S>(dy), Data<S>(*dx), Data<S>(*dpointwise),
                                         Data<S>(*ddepthwise), Parallel(pool)));
  });
}

constexpr char kDenseMisfit[] =
    "x, kernel and y must be (N, H, W, C_in), (K_h, K_w, C_in, C_out) and (N, H_out, W_out, C_out)";

bool DenseFit(const ffi::AnyBuffer& x, const ffi::AnyBuffer& kernel, const ffi::AnyBuffer& y) {
  auto xs = x.dimensions(), ks = kernel.dimensions(), ys = y.dimensions();
  return xs.size() == 4 && ks.size() == 4 && ys.size() == 4 && ks[2] == xs[3] && ks[3] == ys[3] &&
         ys[0] == xs[0] && xs[3] > 0 && ys[3] > 0;
}

ffi::Error DenseForwardHandler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer kernel,
                               ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> mean,
                               ffi::Result<ffi::AnyBuffer> variance, Numbers strides,
                               Numbers padding, Numbers dilation) {
  if (!DenseFit(x, kernel, *y) || !MomentsFit(*y, *mean, *variance)) {
    return ffi::Error::InvalidArgument(kDenseMisfit);
  }
  Geometry g = MakeGeometry(x, kernel, 1, *y, strides, padding, dilation);
  return ForDtype(x.element_type(), [&](auto storage, auto compute) {
    using S = decltype(storage);
    using C = decltype(compute);
    CHANSEL_CALL(DenseForward<S, C>(g, Data<S>(x), Data<S>(kernel), Data<S>(*y),
                                    DataIfAny<C>(*mean), DataIfAny<C>(*variance), Parallel(pool)));
  });
}

ffi::Error DenseDataGradientHandler(ffi::ThreadPool pool, ffi::AnyBuffer kernel, ffi::AnyBuffer dy,
                                    ffi::Result<ffi::AnyBuffer> dx, Numbers strides,
                                    Numbers padding, Numbers dilation) {
  if (!DenseFit(*dx, kernel, dy)) return ffi::Error::InvalidArgument(kDenseMisfit);
  Geometry g = MakeGeometry(*dx, kernel, 1, dy, strides, padding, dilation);
  return ForDtype(dy.element_type(), [&](auto storage, auto compute) {
    using S = decltype(storage);
    using C = decltype(compute);
    CHANSEL_CALL(DenseDataGradient<S, C>(g, Data<S>(kernel), Data<S>(dy), Data<S>(*dx),
                                         Parallel(pool)));
  });
}

ffi::Error DenseKernelGradientHandler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer dy,
                                      ffi::Result<ffi::AnyBuffer> dkernel, Numbers strides,
                                      Numbers padding, Numbers dilation) {
  if (!DenseFit(x, *dkernel, dy)) return ffi::Error::InvalidArgument(kDenseMisfit);
  Geometry g = MakeGeometry(x, *dkernel, 1, dy, strides, padding, dilation);
  return ForDtype(x.element_type(), [&](auto storage, auto compute) {
    using S = decltype(storage);
    using C = decltype(compute);
    CHANSEL_CALL(DenseKernelGradient<S, C>(g, Data<S>(x), Data<S>(dy), Data<S>(*dkernel),
                                           Parallel(pool)));
  });
}

constexpr char kNormMisfit[] =
    "x must be (..., C) and not empty; residual, where there is one, y and dy of its size and dtype; "
    "scale, bias, mean and variance (C) of the dtype of the sums";

ffi::Error MomentsHandler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> mean,
                          ffi::Result<ffi::AnyBuffer> variance) {
  if (!NormFit(x, {}, {}, {&*mean, &*variance})) return ffi::Error::InvalidArgument(kNormMisfit);
  int64_t channels = mean->element_count(), pixels = x.element_count() / channels;
  return ForDtype(x.element_type(), [&](auto storage, auto compute) {
    using S = decltype(storage);
    using C = decltype(compute);
    CHANSEL_CALL(Moments<S, C>(pixels, channels, Data<S>(x), Data<C>(*mean), Data<C>(*variance),
                               Parallel(pool)));
  });
}

ffi::Error NormForwardHandler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer scale,
                              ffi::AnyBuffer bias, ffi::AnyBuffer residual,
                              ffi::AnyBuffer known_mean, ffi::AnyBuffer known_variance,
                              ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> mean,
                              ffi::Result<ffi::AnyBuffer> variance, double epsilon, bool relu) {
  if (!NormFit(x, {&*y}, {&residual}, {&scale, &bias, &*mean, &*variance}) ||
      !MomentsFit(x, known_mean, known_variance)) {
    return ffi::Error::InvalidArgument(kNormMisfit);
  }
  int64_t channels = scale.element_count(), pixels = x.element_count() / channels;
  return ForDtype(x.element_type(), [&](auto storage, auto compute) {
    using S = decltype(storage);
    using C = decltype(compute);
    const bool known = known_mean.element_count();
    if (known) {
      std::copy_n(Data<C>(known_mean), channels, Data<C>(*mean));
      std::copy_n(Data<C>(known_variance), channels, Data<C>(*variance));
    }
    CHANSEL_CALL(NormForward<S, C>(pixels, channels, C(epsilon), relu, Data<S>(x), Data<C>(scale),
                                   Data<C>(bias), DataIfAny<S>(residual), known, Data<S>(*y),
                                   Data<C>(*mean), Data<C>(*variance), Parallel(pool)));
  });
}

ffi::Error NormBackwardHandler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer scale,
                               ffi::AnyBuffer bias, ffi::AnyBuffer y, ffi::AnyBuffer mean,
                               ffi::AnyBuffer variance, ffi::AnyBuffer dy,
                               ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> dscale,
                               ffi::Result<ffi::AnyBuffer> dbias,
                               ffi::Result<ffi::AnyBuffer> dresidual, double epsilon, bool relu) {
  if (!NormFit(x, {&dy, &*dx}, {&y, &*dresidual},
               {&scale, &bias, &mean, &variance, &*dscale, &*dbias}) ||
      y.element_count() < dresidual->element_count()) {
    return ffi::Error::InvalidArgument(kNormMisfit);
  }
  int64_t channels = scale.element_count(), pixels = x.element_count() / channels;
  return ForDtype(x.element_type(), [&](auto storage, auto compute) {
    using S = decltype(storage);
    using C = decltype(compute);
    CHANSEL_CALL(NormBackward<S, C>(pixels, channels, C(epsilon), relu, Data<S>(x), Data<C>(scale),
                                    Data<C>(bias), Data<S>(y), Data<C>(mean), Data<C>(variance),
                                    Data<S>(dy), Data<S>(*dx), Data<C>(*dscale), Data<C>(*dbias),
                                    DataIfAny<S>(*dresidual), Parallel(pool)));
  });
}

// The attributes that every handler of a convolution takes last.
template <typename Binding>
auto WithWindow(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Attr<Numbers>("strides")
      .template Attr<Numbers>("padding")
      .template Attr<Numbers>("dilation");
}

}  // namespace chansel

// The version of XLA's interface that this was compiled for; an earlier one will not do.
extern "C" int ChanselApiVersion() { return XLA_FFI_API_MINOR; }

// The instruction set in use: 0 baseline, 1 AVX2, 2 AVX-512.
extern "C" int ChanselInstructionSet() {
  return static_cast<int>(chansel::instruction_set.load());
}

// Takes no instruction set beyond `most`.
extern "C" void ChanselLimitInstructionSet(int most) {
  auto limit = static_cast<chansel::InstructionSet>(most);
  chansel::instruction_set = std::min(chansel::BestInstructionSet(), limit);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(ChanselForward, chansel::ForwardHandler,
                              chansel::WithWindow(ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // pointwise
                                  .Arg<ffi::AnyBuffer>()  // depthwise
                                  .Ret<ffi::AnyBuffer>()  // y
                                  .Ret<ffi::AnyBuffer>()  // mean, or empty
                                  .Ret<ffi::AnyBuffer>()));  // variance, or empty

XLA_FFI_DEFINE_HANDLER_SYMBOL(ChanselBackward, chansel::BackwardHandler,
                              chansel::WithWindow(ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // pointwise
                                  .Arg<ffi::AnyBuffer>()  // depthwise
                                  .Arg<ffi::AnyBuffer>()  // dy
                                  .Ret<ffi::AnyBuffer>()  // dx
                                  .Ret<ffi::AnyBuffer>()  // dpointwise
                                  .Ret<ffi::AnyBuffer>()));  // ddepthwise

XLA_FFI_DEFINE_HANDLER_SYMBOL(ChanselDenseForward, chansel::DenseForwardHandler,
                              chansel::WithWindow(ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // kernel
                                  .Ret<ffi::AnyBuffer>()  // y
                                  .Ret<ffi::AnyBuffer>()  // mean, or empty
                                  .Ret<ffi::AnyBuffer>()));  // variance, or empty

XLA_FFI_DEFINE_HANDLER_SYMBOL(ChanselDenseDataGradient, chansel::DenseDataGradientHandler,
                              chansel::WithWindow(ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // kernel
                                  .Arg<ffi::AnyBuffer>()  // dy
                                  .Ret<ffi::AnyBuffer>()));  // dx

XLA_FFI_DEFINE_HANDLER_SYMBOL(ChanselDenseKernelGradient, chansel::DenseKernelGradientHandler,
                              chansel::WithWindow(ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // dy
                                  .Ret<ffi::AnyBuffer>()));  // dkernel

XLA_FFI_DEFINE_HANDLER_SYMBOL(ChanselMoments, chansel::MomentsHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Ret<ffi::AnyBuffer>()  // mean
                                  .Ret<ffi::AnyBuffer>());  // variance

XLA_FFI_DEFINE_HANDLER_SYMBOL(ChanselNormForward, chansel::NormForwardHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // scale
                                  .Arg<ffi::AnyBuffer>()  // bias
                                  .Arg<ffi::AnyBuffer>()  // residual, or empty
                                  .Arg<ffi::AnyBuffer>()  // its mean, if it is known, or empty
                                  .Arg<ffi::AnyBuffer>()  // its variance, likewise
                                  .Ret<ffi::AnyBuffer>()  // y
                                  .Ret<ffi::AnyBuffer>()  // mean
                                  .Ret<ffi::AnyBuffer>()  // variance
                                  .Attr<double>("epsilon")
                                  .Attr<bool>("relu"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(ChanselNormBackward, chansel::NormBackwardHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // scale
                                  .Arg<ffi::AnyBuffer>()  // bias
                                  .Arg<ffi::AnyBuffer>()  // y
                                  .Arg<ffi::AnyBuffer>()  // mean
                                  .Arg<ffi::AnyBuffer>()  // variance
                                  .Arg<ffi::AnyBuffer>()  // dy
                                  .Ret<ffi::AnyBuffer>()  // dx
                                  .Ret<ffi::AnyBuffer>()  // dscale
                                  .Ret<ffi::AnyBuffer>()  // dbias
                                  .Ret<ffi::AnyBuffer>()  // dresidual, or empty
                                  .Attr<double>("epsilon")
                                  .Attr<bool>("relu"));
