// Channel selection, pointwise and depthwise fused in cache; included after products.h.
//
// Within a tile, the M = C_out * R weighted sums of a pixel lie rank by rank, and the output
// channels of each rank are padded with zeros to a whole number of vectors:
//   column(r, o) = r * padded_out + o
// so that every inner loop runs over whole vectors.

namespace CHANSEL_TARGET {

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

  int64_t OutputRowsPerUnit() const {
    return g.OutputRowsPerUnit(kTileBytes, tile_width * sums * sizeof(C));
  }

  int64_t InputRowsPerUnit() const {
    int64_t rows = kTileBytes / (tile_width * sums * sizeof(C));
    return std::clamp(rows, std::min<int64_t>(4, g.h), g.h);
  }

  // y[:, first:end] of one image.
  void Forward(const S* x, int64_t first, int64_t end, S* y) const {
    Scratch<C>& scratch = ThreadScratch<C>();
    FillSums(x, first * g.stride_h - g.top, g.InputRows(end - first), scratch);
    for (int64_t i = first; i < end; ++i) {
      const C* tile = scratch.sums.data() + (i - first) * g.stride_h * tile_width * sums;
      WriteRows<S, C>(g.out_w, g.out, padded_out, scratch.line, y + i * g.out_w * g.out,
                      [&](C* line) {
                        for (int64_t o = 0; o < padded_out; o += kLanes<C>) {
                          DepthwiseRow(tile, o, line + o);
                        }
                      });
    }
  }

  // dx[:, first:end] of one image, and what these rows add to the gradients of both kernels:
  // pointwise_sum (in, sums) and depthwise_sum (kernel_h, kernel_w, sums).
  void Backward(const S* x, const S* dy, int64_t first, int64_t end, S* dx, C* pointwise_sum,
                C* depthwise_sum) const {
    Scratch<C>& scratch = ThreadScratch<C>();
    FillSums(x, first, end - first, scratch);
    int64_t first_out = g.FirstOutput(first);
    FillTile(dy, g.out_h, g.out_w, g.out, first_out, g.EndOfOutputs(end),
             {GradientWidth(), GradientLeft(), padded_out}, scratch.output_gradient);
    C* dz = Grow(scratch.sums_gradient, (end - first) * g.w * sums);
    for (int64_t row = first; row < end; ++row) {
      const C* z = scratch.sums.data() + (row - first) * tile_width * sums;
      C* dz_row = dz + (row - first) * g.w * sums;
      const C* const* dy_rows = GradientRows(row, first_out, scratch);
      if (g.stride_w > 1) std::fill(dz_row, dz_row + g.w * sums, C(0));
      for (int64_t column = 0; column < sums; column += kLanes<C>) {
        SumsGradientRow(dy_rows, column, dz_row + column);
        AddDepthwiseGradient(dy_rows, column, z + column, depthwise_sum);
      }
    }
    int64_t pixels = (end - first) * g.w;
    const C* image = AsCompute(x + first * g.w * g.in, pixels * g.in, scratch.image);
    AddOuterProduct(Lines<C>{image, dz, 1, pixels, 0, g.in, 0, sums}, g.in, sums, pointwise_sum);
    WriteRows<S, C>(pixels, g.in, padded_in, scratch.image_gradient, dx + first * g.w * g.in,
                    [&](C* rows) {
                      Product(dz, pixels, sums, transposed_pointwise.data(), padded_in, rows);
                    });
  }

  int64_t PointwiseSize() const { return g.in * sums; }
  int64_t DepthwiseSize() const { return g.kernel_h * g.kernel_w * sums; }

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

  // The weighted sums of input rows top ... top + rows - 1, zero outside the image.
  void FillSums(const S* x, int64_t top, int64_t rows, Scratch<C>& scratch) const {
    C* tile = Grow(scratch.sums, rows * tile_width * sums);
    for (int64_t row = 0; row < rows; ++row, tile += tile_width * sums) {
      if (top + row < 0 || top + row >= g.h) {
        std::fill(tile, tile + tile_width * sums, C(0));
        continue;
      }
      C* image = tile + g.left * sums;
      std::fill(tile, image, C(0));
      std::fill(image + g.w * sums, tile + tile_width * sums, C(0));
      const C* pixels = AsCompute(x + (top + row) * g.w * g.in, g.w * g.in, scratch.image);
      Product(pixels, g.w, g.in, panels.data(), sums, image);
    }
  }

  // How far the columns of the output's gradient are moved to the right in its tile, so that every
  // tap of every pixel finds a column.
  int64_t GradientLeft() const {
    return std::max<int64_t>(0, (g.kernel_w - 1) * g.dilation_w - g.left);
  }

  int64_t GradientWidth() const { return GradientLeft() + std::max(g.out_w, g.w + g.left); }

  // One row of outputs, one vector of channels from o on; tile points at its first row of sums.
  void DepthwiseRow(const C* tile, int64_t o, C* line) const {
    int64_t q = 0;
    for (; q + kBlock <= g.out_w; q += kBlock) DepthwiseBlock<kBlock>(tile, o, q, line);
    for (; q < g.out_w; ++q) DepthwiseBlock<1>(tile, o, q, line);
  }

  template <int PIXELS>
  CHANSEL_INLINE void DepthwiseBlock(const C* tile, int64_t o, int64_t q, C* line) const {
    Vec<C> sum[PIXELS] = {};
    for (int64_t r = 0; r < g.rank; ++r) {
      int64_t column = r * padded_out + o;
      for (int64_t a = 0; a < g.kernel_h; ++a) {
        for (int64_t b = 0; b < g.kernel_w; ++b) {
          Vec<C> tap, z;
          Load(taps.data() + (a * g.kernel_w + b) * sums + column, tap);
          const C* from = tile +
                          ((a * g.dilation_h) * tile_width + q * g.stride_w + b * g.dilation_w) *
                              sums +
                          column;
          CHANSEL_UNROLL
          for (int p = 0; p < PIXELS; ++p) {
            Load(from + p * g.stride_w * sums, z);
            sum[p] += tap * z;
          }
        }
      }
    }
    CHANSEL_UNROLL
    for (int p = 0; p < PIXELS; ++p) Store(sum[p], line + (q + p) * padded_out);
  }

  // For each row of taps, the row of the output's gradient that it multiplies with input row `row`,
  // or null.
  const C* const* GradientRows(int64_t row, int64_t first_out, Scratch<C>& scratch) const {
    const C** rows = Grow(scratch.gradient_rows, g.kernel_h);
    for (int64_t a = 0; a < g.kernel_h; ++a) {
      int64_t output = g.OutputRow(row, a);
      int64_t line = (output - first_out) * GradientWidth() + GradientLeft();
      rows[a] = output < 0 ? nullptr : scratch.output_gradient.data() + line * padded_out;
    }
    return rows;
  }

  // The gradient of one row of sums, one vector of columns.
  void SumsGradientRow(const C* const* dy_rows, int64_t column, C* dz) const {
    if (g.stride_w > 1) return ScatterSumsGradientRow(dy_rows, column, dz);
    int64_t c = 0;
    for (; c + kBlock <= g.w; c += kBlock) GatherSumsGradient<kBlock>(dy_rows, column, c, dz);
    for (; c < g.w; ++c) GatherSumsGradient<1>(dy_rows, column, c, dz);
  }

  template <int PIXELS>
  CHANSEL_INLINE void GatherSumsGradient(const C* const* dy_rows, int64_t column, int64_t c,
                                         C* dz) const {
    Vec<C> sum[PIXELS] = {};
    for (int64_t a = 0; a < g.kernel_h; ++a) {
      if (!dy_rows[a]) continue;
      for (int64_t b = 0; b < g.kernel_w; ++b) {
        Vec<C> tap, gradient;
        Load(taps.data() + (a * g.kernel_w + b) * sums + column, tap);
        const C* from =
            dy_rows[a] + (c + g.left - b * g.dilation_w) * padded_out + column % padded_out;
        CHANSEL_UNROLL
        for (int p = 0; p < PIXELS; ++p) {
          Load(from + p * padded_out, gradient);
          sum[p] += tap * gradient;
        }
      }
    }
    CHANSEL_UNROLL
    for (int p = 0; p < PIXELS; ++p) Store(sum[p], dz + (c + p) * sums);
  }

  void ScatterSumsGradientRow(const C* const* dy_rows, int64_t column, C* dz) const {
    for (int64_t a = 0; a < g.kernel_h; ++a) {
      if (!dy_rows[a]) continue;
      const C* dy = dy_rows[a] + column % padded_out;
      for (int64_t b = 0; b < g.kernel_w; ++b) {
        int64_t offset = b * g.dilation_w - g.left;
        Vec<C> tap, gradient, sum;
        Load(taps.data() + (a * g.kernel_w + b) * sums + column, tap);
        int64_t first = std::max<int64_t>(0, CeilDiv(-offset, g.stride_w));
        for (int64_t q = first; q < g.out_w && q * g.stride_w + offset < g.w; ++q) {
          C* to = dz + (q * g.stride_w + offset) * sums;
          Load(dy + q * padded_out, gradient);
          Load(to, sum);
          Store(sum + tap * gradient, to);
        }
      }
    }
  }

  void AddDepthwiseGradient(const C* const* dy_rows, int64_t column, const C* z,
                            C* depthwise_sum) const {
    for (int64_t a = 0; a < g.kernel_h; ++a) {
      if (!dy_rows[a]) continue;
      for (int64_t b = 0; b < g.kernel_w; ++b) {
        C* to = depthwise_sum + (a * g.kernel_w + b) * sums + column;
        AddProductOfRows(z + b * g.dilation_w * sums, dy_rows[a] + column % padded_out, to);
      }
    }
  }

  // to += sum over the outputs of a row of z * dy; four sums, since one addition awaits another.
  CHANSEL_INLINE void AddProductOfRows(const C* z, const C* dy, C* to) const {
    Vec<C> sum[4] = {}, a, b;
    int64_t z_pitch = g.stride_w * sums;
    int64_t q = 0;
    for (; q + 4 <= g.out_w; q += 4) {
      CHANSEL_UNROLL
      for (int p = 0; p < 4; ++p) {
        Load(z + (q + p) * z_pitch, a);
        Load(dy + (q + p) * padded_out, b);
        sum[p] += a * b;
      }
    }
    for (; q < g.out_w; ++q) {
      Load(z + q * z_pitch, a);
      Load(dy + q * padded_out, b);
      sum[0] += a * b;
    }
    Load(to, a);
    Store(a + ((sum[0] + sum[1]) + (sum[2] + sum[3])), to);
  }

  const Geometry g;
  const int64_t padded_in, padded_out, sums, tile_width;
  std::vector<C> panels, transposed_pointwise, taps;
};

// ---------------------------------------------------------------- all images

template <typename S, typename C>
void SelectionForward(const Geometry& g, const S* x, const S* pointwise, const S* depthwise, S* y,
                      const Parallel& parallel) {
  const SelectionLayer<S, C> layer(g, pointwise, depthwise);
  const RowUnits units{g.n, g.out_h, layer.OutputRowsPerUnit()};
  parallel(units.Count(), [&](int64_t unit) {
    auto [image, first, end] = units.At(unit);
    layer.Forward(x + image * g.InputSize(), first, end, y + image * g.OutputSize());
  });
}

template <typename S, typename C>
void SelectionBackward(const Geometry& g, const S* x, const S* pointwise, const S* depthwise,
                       const S* dy, S* dx, S* dpointwise, S* ddepthwise,
                       const Parallel& parallel) {
  const SelectionLayer<S, C> layer(g, pointwise, depthwise);
  const RowUnits units{g.n, g.h, layer.InputRowsPerUnit()};
  std::vector<C> sum = SumOverGroups<C>(
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
