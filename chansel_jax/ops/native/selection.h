// Channel selection, pointwise and depthwise fused in cache; included after products.h.
//
// Within a tile, the M = C_out * R weighted sums of a pixel lie rank by rank, and the output
// channels of each rank are padded with zeros to a whole number of vectors:
//   column(r, o) = r * padded_out + o
// so that every inner loop runs over whole vectors.

namespace CHANSEL_TARGET {

// Taps that are taken at once: with two sums each they leave room in 16 registers.
constexpr int kMostTaps = 3;

// Pixels of a row, and the taps of a row of the kernel that all of them meet.
template <typename C>
struct MetTaps {
  int64_t z_pitch, dy_pitch;    // from one of the pixels to the next, in the sums and in dy
  int64_t pixels;               // how many there are
  int count = 0;                // of taps
  const C* dy[kMostTaps] = {};  // what the first pixel meets by each tap
  int64_t tap[kMostTaps] = {};  // where each tap's weights begin
};

// ---------------------------------------------------------------- one layer

template <typename S, typename C>
class SelectionLayer {
 public:
  SelectionLayer(const Geometry& geometry, const S* pointwise, const S* depthwise)
      : g(geometry),
        padded_in(RoundUp(g.in, kLanes<C>)),
        padded_out(RoundUp(g.out, kLanes<C>)),
        sums(g.rank * padded_out),
        tile_width(g.TileWidth()) {
    PackPointwise(pointwise);
    PackDepthwise(depthwise);
  }

  // Rows that are computed at once: few enough for many threads, and enough for the rows that two
  // units both need to be few.
  int64_t OutputRowsPerUnit() const {
    int64_t fewest = std::max<int64_t>(8, KeptRows());
    return std::clamp(CeilDiv(g.n * g.out_h, kUnits), std::min(fewest, g.out_h), g.out_h);
  }

  int64_t InputRowsPerUnit() const {
    int64_t rows = kTileBytes / (g.GradientWidth() * padded_out * int64_t(sizeof(C)));
    return std::clamp(rows, std::min<int64_t>(4, g.h), g.h);
  }

  // y[:, first:end] of one image, and their differences unless `moments` is null. Of the weighted
  // sums, the rows are kept that span one output's.
  void Forward(const S* x, int64_t first, int64_t end, S* y, Differences<C>* moments) const {
    if (g.out_w == 0) return;
    Scratch<C>& scratch = ThreadScratch<C>();
    const int64_t kept = KeptRows(), row_size = tile_width * sums;
    const int64_t top = first * g.stride_h - g.top;
    C* const ring = Grow(scratch.sums, kept * row_size);
    const C** rows = Grow(scratch.rows, g.kernel_h);
    int64_t next = top;
    for (int64_t i = first; i < end; ++i) {
      const int64_t row = i * g.stride_h - g.top;
      for (next = std::max(next, row); next < row + kept; ++next) {
        FillSums(x, next, scratch, ring + (next - top) % kept * row_size);
      }
      for (int64_t a = 0; a < g.kernel_h; ++a) {
        rows[a] = ring + (row + a * g.dilation_h - top) % kept * row_size;
      }
      Ahead ahead;
      const int64_t first_new = row + std::max(kept, g.stride_h);
      if (first_new < g.h) {
        ahead.Add(x + first_new * g.w * g.in, std::min(kept, g.stride_h) * g.w * g.in);
      }
      auto compute = [&](C* line, auto streamed, auto wanted) {
        ForPanels<C>(padded_out, [&](auto vectors, int64_t o) {
          constexpr int64_t kColumns = vectors * kLanes<C>;
          if (wanted && i == first) {
            DepthwiseBlock<1, vectors, false, false>(rows, o, 0, moments->near.data() + o, nullptr);
            moments->Begin(o, kColumns);
          }
          DepthwiseRow<vectors, streamed, wanted>(rows, o, ahead, line + o, moments);
          if (wanted) moments->FoldAfter(i - first, g.out_w, i + 1 == end, o, kColumns);
        });
      };
      WriteRows<S, C>(g.out_w, g.out, padded_out, g.n * g.OutputSize() * sizeof(S), scratch.line,
                      y + i * g.out_w * g.out, [&](C* line, auto streamed) {
                        if (!moments) return compute(line, streamed, std::false_type());
                        compute(line, streamed, std::true_type());
                      });
    }
    if (moments) moments->pixels = (end - first) * g.out_w;
  }

  // dx[:, first:end] of one image, and what these rows add to the gradients of both kernels:
  // pointwise_sum (in, sums) and depthwise_sum (kernel_h, kernel_w, sums). As many rows are taken
  // at once as leave what is computed of them in the first-level cache.
  void Backward(const S* x, const S* dy, int64_t first, int64_t end, S* dx, C* pointwise_sum,
                C* depthwise_sum) const {
    Scratch<C>& scratch = ThreadScratch<C>();
    const int64_t first_out = g.FirstOutput(first);
    FillTile(dy, g.out_h, g.out_w, g.out, first_out, g.EndOfOutputs(end),
             {g.GradientWidth(), g.GradientLeft(), padded_out}, scratch.output_gradient);
    // The gradient of the unit that this thread is likely to take next.
    const int64_t end_out = std::max(first_out, g.EndOfOutputs(end));
    const int64_t read = (end_out - first_out) * g.out_w * g.out;
    const S* const next = dy + end_out * g.out_w * g.out;
    const int64_t row_size = g.w * sums;
    const int64_t row_bytes = std::max<int64_t>(1, row_size * sizeof(C));
    const int64_t at_once = std::max<int64_t>(1, kLinesBytes / 2 / row_bytes);
    for (int64_t top = first; top < end; top += at_once) {
      const int64_t rows = std::min(at_once, end - top), pixels = rows * g.w;
      const S* from = x + top * g.w * g.in;
      Ahead ahead;
      ahead.Add(from + pixels * g.in, pixels * g.in);
      ahead.Add(next + read * (top - first) / (end - first), read * rows / (end - first));
      const C* image = AsCompute(from, pixels * g.in, scratch.image);
      C* z = Grow(scratch.sums, pixels * sums);
      C* dz = Grow(scratch.sums_gradient, pixels * sums);
      Product<false>(image, pixels, g.in, panels.data(), sums, z);
      std::fill(dz, dz + pixels * sums, C(0));
      for (int64_t row = 0; row < rows; ++row) {
        const C* const* dy_rows = GradientRows(top + row, first_out, scratch);
        for (int64_t column = 0; column < sums; column += kLanes<C>) {
          RowGradients(dy_rows, column, z + row * row_size, dz + row * row_size, ahead,
                       depthwise_sum);
        }
      }
      AddOuterProduct(Lines<C>{image, dz, 1, pixels, 0, g.in, 0, sums}, g.in, sums, pointwise_sum);
      WriteRows<S, C>(pixels, g.in, padded_in, g.n * g.InputSize() * sizeof(S),
                      scratch.image_gradient, dx + top * g.w * g.in, [&](C* to, auto streamed) {
                        Product<streamed>(dz, pixels, sums, transposed_pointwise.data(),
                                          padded_in, to);
                      });
    }
  }

  int64_t PointwiseSize() const { return g.in * sums; }
  int64_t DepthwiseSize() const { return g.kernel_h * g.kernel_w * sums; }
  int64_t PaddedOut() const { return padded_out; }

  void StorePointwise(const C* from, S* to) const {
    for (int64_t i = 0; i < g.in; ++i) {
      for (int64_t o = 0; o < g.out; ++o) {
        for (int64_t r = 0; r < g.rank; ++r) {
          *to++ = ToStorage<S>(from[i * sums + r * padded_out + o]);
        }
      }
    }
  }

  void StoreDepthwise(const C* from, S* to) const {
    for (int64_t tap = 0; tap < g.kernel_h * g.kernel_w; ++tap) {
      for (int64_t r = 0; r < g.rank; ++r) {
        for (int64_t o = 0; o < g.out; ++o) {
          *to++ = ToStorage<S>(from[tap * sums + r * padded_out + o]);
        }
      }
    }
  }

 private:
  void PackPointwise(const S* from) {
    panels.assign(g.in * sums, C(0));
    transposed_pointwise.assign(sums * padded_in, C(0));
    for (int64_t i = 0; i < g.in; ++i) {
      for (int64_t o = 0; o < g.out; ++o) {
        for (int64_t r = 0; r < g.rank; ++r) {
          C value = ToCompute(*from++);
          int64_t column = r * padded_out + o;
          panels[PanelIndex<C>(i, column, g.in, sums)] = value;
          transposed_pointwise[PanelIndex<C>(column, i, sums, padded_in)] = value;
        }
      }
    }
  }

  void PackDepthwise(const S* from) {
    taps.assign(DepthwiseSize(), C(0));
    for (int64_t tap = 0; tap < g.kernel_h * g.kernel_w; ++tap) {
      for (int64_t r = 0; r < g.rank; ++r) {
        for (int64_t o = 0; o < g.out; ++o) {
          taps[tap * sums + r * padded_out + o] = ToCompute(*from++);
        }
      }
    }
  }

  // The weighted sums of an input row with zeros around it; of one outside the image, zeros.
  void FillSums(const S* x, int64_t row, Scratch<C>& scratch, C* to) const {
    C* const end = to + tile_width * sums;
    if (row < 0 || row >= g.h) return std::fill(to, end, C(0));
    C* const image = to + g.left * sums;
    std::fill(to, image, C(0));
    std::fill(image + g.w * sums, end, C(0));
    const C* pixels = AsCompute(x + row * g.w * g.in, g.w * g.in, scratch.image);
    Product<false>(pixels, g.w, g.in, panels.data(), sums, image);
  }

  int64_t KeptRows() const { return (g.kernel_h - 1) * g.dilation_h + 1; }

  // One row of outputs, so many vectors of channels from o on, of the rows of sums that it reads.
  template <int VECTORS, bool STREAMED, bool MOMENTS>
  void DepthwiseRow(const C* const* rows, int64_t o, Ahead& ahead, C* line,
                    Differences<C>* moments) const {
    constexpr int kPixels = kSums / 2 / VECTORS;
    int64_t q = 0;
    for (; q + kPixels <= g.out_w; q += kPixels) {
      DepthwiseBlock<kPixels, VECTORS, STREAMED, MOMENTS>(rows, o, q, line, moments);
      const Ahead::Lines lines = ahead.Take(kPixels * VECTORS);
      for (int64_t i = 0; i < lines.count; ++i) lines.Ask(i);
    }
    for (; q < g.out_w; ++q) {
      DepthwiseBlock<1, VECTORS, STREAMED, MOMENTS>(rows, o, q, line, moments);
    }
  }

  template <int PIXELS, int VECTORS, bool STREAMED, bool MOMENTS>
  CHANSEL_INLINE void DepthwiseBlock(const C* const* rows, int64_t o, int64_t q, C* line,
                                     Differences<C>* moments) const {
    Vec<C> sum[PIXELS][VECTORS] = {};
    for (int64_t r = 0; r < g.rank; ++r) {
      int64_t column = r * padded_out + o;
      for (int64_t a = 0; a < g.kernel_h; ++a) {
        for (int64_t b = 0; b < g.kernel_w; ++b) {
          Vec<C> tap[VECTORS], z;
          const C* weights = taps.data() + (a * g.kernel_w + b) * sums + column;
          CHANSEL_UNROLL
          for (int v = 0; v < VECTORS; ++v) Load(weights + v * kLanes<C>, tap[v]);
          const C* from = rows[a] + (q * g.stride_w + b * g.dilation_w) * sums + column;
          CHANSEL_UNROLL
          for (int p = 0; p < PIXELS; ++p) {
            CHANSEL_UNROLL
            for (int v = 0; v < VECTORS; ++v) {
              Load(from + p * g.stride_w * sums + v * kLanes<C>, z);
              sum[p][v] += tap[v] * z;
            }
          }
        }
      }
    }
    CHANSEL_UNROLL
    for (int p = 0; p < PIXELS; ++p) {
      CHANSEL_UNROLL
      for (int v = 0; v < VECTORS; ++v) {
        Put<STREAMED && kWholeLines<VECTORS>>(sum[p][v],
                                              line + (q + p) * padded_out + v * kLanes<C>);
      }
    }
    if constexpr (MOMENTS) AddDifferences<PIXELS, VECTORS>(sum, o, *moments);
  }

  // For each row of taps, the row of the output's gradient that it multiplies with input row `row`,
  // or null.
  const C* const* GradientRows(int64_t row, int64_t first_out, Scratch<C>& scratch) const {
    const C** rows = Grow(scratch.rows, g.kernel_h);
    for (int64_t a = 0; a < g.kernel_h; ++a) {
      int64_t output = g.OutputRow(row, a);
      int64_t line = (output - first_out) * g.GradientWidth() + g.GradientLeft();
      rows[a] = output < 0 ? nullptr : scratch.output_gradient.data() + line * padded_out;
    }
    return rows;
  }

  // Of one row of pixels and one vector of columns: the gradient of the sums, added to dz, and what
  // the row adds to the depthwise kernel's. Pixels that are a stride apart meet the same taps.
  void RowGradients(const C* const* dy_rows, int64_t column, const C* z, C* dz, Ahead& ahead,
                    C* depthwise_sum) const {
    for (int64_t phase = 0; phase < std::min(g.stride_w, g.w); ++phase) {
      for (int64_t a = 0; a < g.kernel_h; ++a) {
        if (!dy_rows[a]) continue;
        MetTaps<C> met{g.stride_w * sums, padded_out, CeilDiv(g.w - phase, g.stride_w)};
        const int64_t at = phase * sums + column;
        for (int64_t b = 0; b < g.kernel_w; ++b) {
          const int64_t q = phase + g.left - b * g.dilation_w;
          if (q % g.stride_w) continue;
          met.dy[met.count] = dy_rows[a] + q / g.stride_w * padded_out + column % padded_out;
          met.tap[met.count++] = (a * g.kernel_w + b) * sums + column;
          if (met.count == kMostTaps) {
            AddTaps<kMostTaps>(met, z + at, dz + at, ahead, depthwise_sum);
            met.count = 0;
          }
        }
        if (met.count == 2) AddTaps<2>(met, z + at, dz + at, ahead, depthwise_sum);
        if (met.count == 1) AddTaps<1>(met, z + at, dz + at, ahead, depthwise_sum);
      }
    }
  }

  // Two sums of each tap, since one addition awaits another.
  template <int TAPS>
  CHANSEL_INLINE void AddTaps(const MetTaps<C>& met, const C* z, C* dz, Ahead& ahead,
                              C* depthwise_sum) const {
    Vec<C> tap[TAPS], sum[TAPS][2] = {};
    const C* dy[TAPS];
    CHANSEL_UNROLL
    for (int t = 0; t < TAPS; ++t) {
      Load(taps.data() + met.tap[t], tap[t]);
      dy[t] = met.dy[t];
    }
    const Ahead::Lines lines = ahead.Take(met.pixels);
    auto add = [&](int64_t pixel, int which) {
      Vec<C> value, gradient, result;
      Load(z + pixel * met.z_pitch, value);
      Load(dz + pixel * met.z_pitch, result);
      CHANSEL_UNROLL
      for (int t = 0; t < TAPS; ++t) {
        Load(dy[t] + pixel * met.dy_pitch, gradient);
        result += tap[t] * gradient;
        sum[t][which] += value * gradient;
      }
      Store(result, dz + pixel * met.z_pitch);
      lines.Ask(pixel);
    };
    int64_t pixel = 0;
    for (; pixel + 2 <= met.pixels; pixel += 2) {
      add(pixel, 0);
      add(pixel + 1, 1);
    }
    if (pixel < met.pixels) add(pixel, 0);
    CHANSEL_UNROLL
    for (int t = 0; t < TAPS; ++t) {
      Vec<C> total;
      Load(depthwise_sum + met.tap[t], total);
      Store(total + (sum[t][0] + sum[t][1]), depthwise_sum + met.tap[t]);
    }
  }

  const Geometry g;
  const int64_t padded_in, padded_out, sums, tile_width;
  Buffer<C> panels, transposed_pointwise, taps;
};

// ---------------------------------------------------------------- all images

// y, and unless `mean` is null the mean and variance of its channels.
template <typename S, typename C>
void SelectionForward(const Geometry& g, const S* x, const S* pointwise, const S* depthwise, S* y,
                      C* mean, C* variance, const Parallel& parallel) {
  const SelectionLayer<S, C> layer(g, pointwise, depthwise);
  const RowUnits units{g.n, g.out_h, layer.OutputRowsPerUnit()};
  std::vector<Differences<C>> moments(mean ? units.Count() : 0, Differences<C>(layer.PaddedOut()));
  parallel(units.Count(), [&](int64_t unit) {
    auto [image, first, end] = units.At(unit);
    layer.Forward(x + image * g.InputSize(), first, end, y + image * g.OutputSize(),
                  mean ? &moments[unit] : nullptr);
  });
  if (mean) StoreMoments(moments, g.out, mean, variance);
}

template <typename S, typename C>
void SelectionBackward(const Geometry& g, const S* x, const S* pointwise, const S* depthwise,
                       const S* dy, S* dx, S* dpointwise, S* ddepthwise,
                       const Parallel& parallel) {
  const SelectionLayer<S, C> layer(g, pointwise, depthwise);
  const RowUnits units{g.n, g.h, layer.InputRowsPerUnit()};
  Buffer<C> sum = SumOverGroups<C>(
      units.Count(), layer.PointwiseSize() + layer.DepthwiseSize(), parallel,
      [&](int64_t unit, C* sum) {
        auto [image, first, end] = units.At(unit);
        layer.Backward(x + image * g.InputSize(), dy + image * g.OutputSize(), first, end,
                       dx + image * g.InputSize(), sum, sum + layer.PointwiseSize());
      });
  layer.StorePointwise(sum.data(), dpointwise);
  layer.StoreDepthwise(sum.data() + layer.PointwiseSize(), ddepthwise);
}

}  // namespace CHANSEL_TARGET
