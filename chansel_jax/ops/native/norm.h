// Batch normalisation, with the sum and the ReLU that may follow it, for one instruction set; see
// products.h. Forward reads the pixels twice and writes them once, backward likewise.

namespace CHANSEL_TARGET {

// Pixels (pixels, channels) in units of work, each of whole periods: so many numbers that they are
// whole pixels, whole vectors, and enough vectors for the sums of one not to wait for those of the
// one before; so many periods that the sums are few beside the pixels. The last unit is filled up.
// Units do not depend on the number of threads.
template <typename C>
struct PixelUnits {
  int64_t total, channels, period, size;

  PixelUnits(int64_t pixels, int64_t channels) : total(pixels * channels), channels(channels) {
    constexpr int64_t kNumbers = 4 << 10, kFewest = 8 * kLanes<C>, kPeriods = 32;
    int64_t common = std::lcm(channels, kLanes<C>);
    period = common * CeilDiv(kFewest, common);
    size = RoundUp(std::min(std::max(kNumbers, kPeriods * period), total), period);
  }

  int64_t Count() const { return CeilDiv(total, size); }
  int64_t Begin(int64_t unit) const { return unit * size; }
  int64_t Numbers(int64_t unit) const { return std::min(size, total - unit * size); }
  int64_t Padded(int64_t unit) const { return RoundUp(Numbers(unit), period); }

  // What there is for each channel, for each number of a period.
  Buffer<C> Repeated(const C* of_channels) const {
    Buffer<C> of_period(period);
    for (int64_t i = 0; i < period; ++i) of_period[i] = of_channels[i % channels];
    return of_period;
  }
};

template <typename C>
struct NormScratch {
  Buffer<C> x, gradient, other, to, residual, sums;
};

template <typename C>
NormScratch<C>& ThreadNormScratch() {
  static thread_local NormScratch<C> scratch;
  return scratch;
}

// `count` numbers as the type of computation, filled up to `padded` by those of a pixel.
template <typename S, typename C>
const C* Filled(const S* from, int64_t count, int64_t padded, const Buffer<C>& pixel,
                Buffer<C>& scratch) {
  if constexpr (std::is_same_v<S, C>) {
    if (count == padded) return from;
  }
  C* to = Grow(scratch, padded);
  for (int64_t i = 0; i < count; ++i) to[i] = ToCompute(from[i]);
  for (int64_t i = count; i < padded; ++i) to[i] = pixel[i % pixel.size()];
  return to;
}

// Calls body(number, number of the period) for each vector.
template <typename C, typename Body>
CHANSEL_INLINE void ForVectors(int64_t padded, int64_t period, const Body& body) {
  for (int64_t row = 0; row < padded; row += period) {
    for (int64_t i = 0; i < period; i += kLanes<C>) body(row + i, i);
  }
}

// For each channel, two sums over all pixels: of a unit sum(unit, first, second) computes those for
// each number of a period. They are added up in a fixed order, in float64.
template <typename C, typename Sum>
std::vector<double> TwoSums(const PixelUnits<C>& units, const Parallel& parallel, const Sum& sum) {
  int64_t channels = units.channels;
  std::vector<double> of_units(units.Count() * 2 * channels, 0.0);
  parallel(units.Count(), [&](int64_t unit) {
    Buffer<C>& of_period = ThreadNormScratch<C>().sums;
    of_period.assign(2 * units.period, C(0));
    sum(unit, of_period.data(), of_period.data() + units.period);
    double* to = of_units.data() + unit * 2 * channels;
    for (int which = 0; which < 2; ++which, to += channels) {
      const C* from = of_period.data() + which * units.period;
      for (int64_t pixel = 0; pixel < units.period; pixel += channels) {
        for (int64_t c = 0; c < channels; ++c) to[c] += from[pixel + c];
      }
    }
  });
  std::vector<double> sums(2 * channels, 0.0);
  for (int64_t unit = 0; unit < units.Count(); ++unit) {
    const double* from = of_units.data() + unit * 2 * channels;
    for (int64_t c = 0; c < 2 * channels; ++c) sums[c] += from[c];
  }
  return sums;
}

// What a pixel is multiplied by when it is normalised.
template <typename C>
C Multiplier(C scale, C variance, C epsilon) {
  return scale / std::sqrt(variance + epsilon);
}

// Mean and variance of each channel of x.
template <typename S, typename C>
void Moments(int64_t pixels, int64_t channels, const S* x, C* mean, C* variance,
             const Parallel& parallel) {
  const PixelUnits<C> units(pixels, channels);
  // Differences to the mean of the first unit: sums of squares of large numbers that hardly differ
  // would cancel each other.
  std::vector<double> total(channels, 0.0);
  for (int64_t at = 0; at < units.Numbers(0); at += channels) {
    for (int64_t c = 0; c < channels; ++c) total[c] += ToCompute(x[at + c]);
  }
  Buffer<C> near(channels);
  for (int64_t c = 0; c < channels; ++c) near[c] = C(total[c] / (units.Numbers(0) / channels));
  Buffer<C> shifts = units.Repeated(near.data());
  std::vector<double> sums = TwoSums(units, parallel, [&](int64_t unit, C* sum, C* squares) {
    NormScratch<C>& scratch = ThreadNormScratch<C>();
    int64_t padded = units.Padded(unit);
    const C* from = Filled(x + units.Begin(unit), units.Numbers(unit), padded, near, scratch.x);
    ForVectors<C>(padded, units.period, [&](int64_t at, int64_t i) {
      Vec<C> value, shift, first_sum, second_sum;
      Load(from + at, value);
      Load(shifts.data() + i, shift);
      Load(sum + i, first_sum);
      Load(squares + i, second_sum);
      value -= shift;
      Store(first_sum + value, sum + i);
      Store(second_sum + value * value, squares + i);
    });
  });
  for (int64_t c = 0; c < channels; ++c) {
    StoreMoment<C>(near[c], sums[c], sums[channels + c], pixels, mean + c, variance + c);
  }
}

// y = (x - mean) * multiplier + bias, plus `residual` unless it is null; then ReLU, which leaves
// what is not a number. Mean and variance are those of x, computed here unless they are `known`.
template <typename S, typename C>
void NormForward(int64_t pixels, int64_t channels, C epsilon, bool relu, const S* x, const C* scale,
                 const C* bias, const S* residual, bool known, S* y, C* mean, C* variance,
                 const Parallel& parallel) {
  const PixelUnits<C> units(pixels, channels);
  if (!known) Moments(pixels, channels, x, mean, variance, parallel);
  Buffer<C> multipliers(channels);
  for (int64_t c = 0; c < channels; ++c) {
    multipliers[c] = Multiplier(scale[c], variance[c], epsilon);
  }
  Buffer<C> means = units.Repeated(mean);
  multipliers = units.Repeated(multipliers.data());
  const Buffer<C> biases = units.Repeated(bias);
  const Buffer<C> zero(1, C(0));
  auto normalise = [&](auto has_residual, auto has_relu) {
    parallel(units.Count(), [&](int64_t unit) {
      NormScratch<C>& scratch = ThreadNormScratch<C>();
      int64_t begin = units.Begin(unit), count = units.Numbers(unit), padded = units.Padded(unit);
      const C* from = Filled(x + begin, count, padded, zero, scratch.x);
      const C* added = nullptr;
      if constexpr (decltype(has_residual)::value) {
        added = Filled(residual + begin, count, padded, zero, scratch.other);
      }
      auto write = [&](C* to, auto streamed) {
        ForVectors<C>(padded, units.period, [&](int64_t at, int64_t i) {
          Vec<C> value, center, multiplier, offset, other;
          Load(from + at, value);
          Load(means.data() + i, center);
          Load(multipliers.data() + i, multiplier);
          Load(biases.data() + i, offset);
          value = (value - center) * multiplier + offset;
          if constexpr (decltype(has_residual)::value) {
            Load(added + at, other);
            value += other;
          }
          if constexpr (decltype(has_relu)::value) value = value < Vec<C>{} ? Vec<C>{} : value;
          Put<streamed>(value, to + at);
        });
      };
      WriteRows(1, count, padded, units.total * sizeof(S), scratch.to, y + begin, write);
    });
  };
  WithFlags(residual != nullptr, relu, normalise);
}

// The gradients of the above by x, scale, bias and, unless `dresidual` is null, residual. With a
// residual, `y` tells what ReLU let through; without one, it is computed again.
template <typename S, typename C>
void NormBackward(int64_t pixels, int64_t channels, C epsilon, bool relu, const S* x,
                  const C* scale, const C* bias, const S* y, const C* mean, const C* variance,
                  const S* dy, S* dx, C* dscale, C* dbias, S* dresidual,
                  const Parallel& parallel) {
  PixelUnits<C> units(pixels, channels);
  const Buffer<C> zero(1, C(0));
  Buffer<C> multipliers(channels);
  for (int64_t c = 0; c < channels; ++c) {
    multipliers[c] = Multiplier(scale[c], variance[c], epsilon);
  }
  const Buffer<C> means = units.Repeated(mean);
  const Buffer<C> biases = units.Repeated(bias);
  const Buffer<C> repeated = units.Repeated(multipliers.data());

  // Has body(number, number of the period, x - mean, what comes back through ReLU) for each vector.
  auto for_vectors = [&](int64_t unit, auto has_residual, auto has_relu, const auto& body) {
    constexpr bool kByOutput = decltype(has_relu)::value && decltype(has_residual)::value;
    constexpr bool kAgain = decltype(has_relu)::value && !decltype(has_residual)::value;
    NormScratch<C>& scratch = ThreadNormScratch<C>();
    int64_t begin = units.Begin(unit), count = units.Numbers(unit), padded = units.Padded(unit);
    const C* from = Filled(x + begin, count, padded, zero, scratch.x);
    const C* back = Filled(dy + begin, count, padded, zero, scratch.gradient);
    const C* after = nullptr;
    if constexpr (kByOutput) after = Filled(y + begin, count, padded, zero, scratch.other);
    ForVectors<C>(padded, units.period, [&](int64_t at, int64_t i) {
      Vec<C> value, center, gradient, passed{};
      Load(from + at, value);
      Load(means.data() + i, center);
      Load(back + at, gradient);
      value -= center;
      if constexpr (kByOutput) Load(after + at, passed);
      if constexpr (kAgain) {
        Vec<C> multiplier, offset;
        Load(repeated.data() + i, multiplier);
        Load(biases.data() + i, offset);
        passed = value * multiplier + offset;
      }
      if constexpr (kByOutput || kAgain) gradient = passed > Vec<C>{} ? gradient : Vec<C>{};
      body(at, i, value, gradient);
    });
  };

  auto compute = [&](auto has_residual, auto has_relu) {
    std::vector<double> sums = TwoSums(units, parallel, [&](int64_t unit, C* sum, C* products) {
      for_vectors(unit, has_residual, has_relu,
                  [&](int64_t, int64_t i, const Vec<C>& value, const Vec<C>& gradient) {
                    Vec<C> first_sum, second_sum;
                    Load(sum + i, first_sum);
                    Load(products + i, second_sum);
                    Store(first_sum + gradient, sum + i);
                    Store(second_sum + gradient * value, products + i);
                  });
    });
    // dx = multiplier * gradient - offset - (x - mean) * slope
    Buffer<C> offsets(channels), slopes(channels);
    for (int64_t c = 0; c < channels; ++c) {
      double squared = double(variance[c]) + double(epsilon);
      dbias[c] = C(sums[c]);
      dscale[c] = C(sums[channels + c] / std::sqrt(squared));
      offsets[c] = C(multipliers[c] * sums[c] / pixels);
      slopes[c] = C(multipliers[c] * sums[channels + c] / (squared * pixels));
    }
    offsets = units.Repeated(offsets.data());
    slopes = units.Repeated(slopes.data());
    parallel(units.Count(), [&](int64_t unit) {
      int64_t begin = units.Begin(unit), count = units.Numbers(unit), padded = units.Padded(unit);
      NormScratch<C>& scratch = ThreadNormScratch<C>();
      auto write = [&](C* to, C* residual_to, auto streamed) {
        for_vectors(unit, has_residual, has_relu,
                    [&](int64_t at, int64_t i, const Vec<C>& value, const Vec<C>& gradient) {
                      Vec<C> multiplier, offset, slope;
                      Load(repeated.data() + i, multiplier);
                      Load(offsets.data() + i, offset);
                      Load(slopes.data() + i, slope);
                      Put<streamed>(gradient * multiplier - offset - value * slope, to + at);
                      if constexpr (decltype(has_residual)::value) {
                        Put<streamed>(gradient, residual_to + at);
                      }
                    });
      };
      int64_t bytes = units.total * sizeof(S);
      WriteRows(1, count, padded, bytes, scratch.to, dx + begin, [&](C* to, auto streamed) {
        if constexpr (decltype(has_residual)::value) {
          WriteRows(1, count, padded, streamed ? bytes : 0, scratch.residual, dresidual + begin,
                    [&](C* residual_to, auto both) {
                      write(to, residual_to, std::bool_constant<streamed && both>());
                    });
        } else {
          write(to, nullptr, streamed);
        }
      });
    });
  };
  WithFlags(dresidual != nullptr, relu, compute);
}

}  // namespace CHANSEL_TARGET
