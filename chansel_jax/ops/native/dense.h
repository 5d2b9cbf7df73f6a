// The dense convolution and its gradients; included after products.h.
//
// All three are products of matrices whose factors are never gathered: pixels of a row lie at a
// fixed distance in the padded image, and the taps of a row of the kernel, times the input
// channels, lie side by side.

namespace CHANSEL_TARGET {

template <typename S, typename C>
class DenseLayer {
 public:
  explicit DenseLayer(const Geometry& geometry)
      : g(geometry),
        padded_in(RoundUp(g.in, kLanes<C>)),
        padded_out(RoundUp(g.out, kLanes<C>)),
        taps(g.kernel_h * g.kernel_w),
        tile_width(g.TileWidth()),
        gradient_left(g.GradientLeft()),
        gradient_width(g.GradientWidth()) {}

  // The kernel (taps * in, out) in panels, for Forward.
  Buffer<C> Panels(const S* kernel) const {
    Buffer<C> panels(taps * g.in * padded_out, C(0));
    for (int64_t k = 0; k < taps * g.in; ++k) {
      for (int64_t o = 0; o < g.out; ++o) {
        panels[PanelIndex<C>(k, o, taps * g.in, padded_out)] = ToCompute(*kernel++);
      }
    }
    return panels;
  }

  // The kernel as (taps * out, in) in panels, for DataGradient.
  Buffer<C> TransposedPanels(const S* kernel) const {
    Buffer<C> panels(taps * g.out * padded_in, C(0));
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t i = 0; i < g.in; ++i) {
        for (int64_t o = 0; o < g.out; ++o) {
          panels[PanelIndex<C>(tap * g.out + o, i, taps * g.out, padded_in)] = ToCompute(*kernel++);
        }
      }
    }
    return panels;
  }

  int64_t OutputRowsPerUnit(int64_t tile_bytes) const {
    return g.OutputRowsPerUnit(tile_bytes, tile_width * g.in * sizeof(C));
  }

  int64_t InputRowsPerUnit() const {
    int64_t output_rows = kTileBytes / (gradient_width * g.out * sizeof(C));
    int64_t rows = std::min(output_rows, g.out_h) * g.stride_h - (g.kernel_h - 1) * g.dilation_h;
    return std::clamp(rows, std::min<int64_t>(4, g.h), g.h);
  }

  // y[:, first:end] of one image, and their differences unless `moments` is null.
  void Forward(const S* x, const C* panels, int64_t first, int64_t end, S* y,
               Differences<C>* moments) const {
    Scratch<C>& scratch = ThreadScratch<C>();
    const C* tile = FillImage(x, first, end, scratch);
    const int64_t pixels = (end - first) * g.out_w;
    auto compute = [&](C* lines, auto streamed, auto wanted) {
      ForPanels<C>(padded_out, [&](auto vectors, int64_t c) {
        const C* panel = panels + c * taps * g.in;
        constexpr int64_t kColumns = vectors * kLanes<C>;
        if constexpr (decltype(wanted)::value) {
          ProductBlock<1, vectors, false>(OutputRuns(tile), 0, panel, moments->near.data() + c, 0);
          moments->Begin(c, kColumns);
        }
        for (int64_t i = 0; i < end - first; ++i) {
          ProductPanel<kSums / vectors, vectors, streamed, wanted>(
              OutputRuns(tile + i * g.stride_h * tile_width * g.in), 0, g.out_w, panel,
              lines + i * g.out_w * padded_out + c, padded_out, moments, c);
          if constexpr (decltype(wanted)::value) {
            moments->FoldAfter(i, g.out_w, first + i + 1 == end, c, kColumns);
          }
        }
      });
    };
    WriteRows<S, C>(pixels, g.out, padded_out, g.n * g.OutputSize() * sizeof(S), scratch.line,
                    y + first * g.out_w * g.out, [&](C* lines, auto streamed) {
                      if (!moments || !pixels) return compute(lines, streamed, std::false_type());
                      moments->pixels = pixels;
                      compute(lines, streamed, std::true_type());
                    });
  }

  // dx[:, first:end] of one image.
  void DataGradient(const S* dy, const C* panels, int64_t first, int64_t end, S* dx) const {
    Scratch<C>& scratch = ThreadScratch<C>();
    int64_t first_out = g.FirstOutput(first);
    const C* tile = FillTile(dy, g.out_h, g.out_w, g.out, first_out, g.EndOfOutputs(end),
                             {gradient_width, gradient_left, g.out}, scratch.output_gradient);
    WriteRows<S, C>(
        (end - first) * g.w, g.in, padded_in, g.n * g.InputSize() * sizeof(S), scratch.line,
        dx + first * g.w * g.in, [&](C* lines, auto streamed) {
          ForPanels<C>(padded_in, [&](auto vectors, int64_t c) {
            for (int64_t row = first; row < end; ++row) {
              // Columns that are a stride apart meet the same taps.
              for (int64_t phase = 0; phase < std::min(g.stride_w, g.w); ++phase) {
                ProductPanel<kSums / vectors, vectors, streamed>(
                    GradientRuns(tile, first_out, row, phase), 0,
                    CeilDiv(g.w - phase, g.stride_w), panels + c * taps * g.out,
                    lines + ((row - first) * g.w + phase) * padded_in + c, g.stride_w * padded_in);
              }
            }
          });
        });
  }

  // What the outputs [:, first:end] of one image add to the kernel's gradient (taps * in,
  // padded_out).
  void AddKernelGradient(const S* x, const S* dy, int64_t first, int64_t end, C* sum) const {
    Scratch<C>& scratch = ThreadScratch<C>();
    const C* tile = FillImage(x, first, end, scratch);
    int64_t pixels = (end - first) * g.out_w;
    const S* from = dy + first * g.out_w * g.out;
    const C* gradient;
    if (g.out == padded_out) {
      gradient = AsCompute(from, pixels * g.out, scratch.output_gradient);
    } else {
      C* padded = Grow(scratch.output_gradient, pixels * padded_out);
      PadRows(from, pixels, g.out, padded_out, padded);
      gradient = padded;
    }
    const Runs<C> runs = OutputRuns(tile);
    for (const Run<C>* run = runs.first; run < runs.first + runs.count; ++run) {
      const Lines<C> lines{run->a,
                           gradient,
                           end - first,
                           g.out_w,
                           g.stride_h * tile_width * g.in,
                           runs.pitch,
                           g.out_w * padded_out,
                           padded_out};
      AddOuterProduct(lines, run->depth, padded_out, sum + run->row * padded_out);
    }
  }

  int64_t KernelSize() const { return taps * g.in * padded_out; }
  int64_t PaddedOut() const { return padded_out; }

  void StoreKernel(const C* from, S* to) const {
    for (int64_t k = 0; k < taps * g.in; ++k, from += padded_out) {
      for (int64_t o = 0; o < g.out; ++o) *to++ = ToStorage<S>(from[o]);
    }
  }

 private:
  // Of this thread, until it asks again.
  static std::vector<Run<C>>& EmptyRuns() {
    static thread_local std::vector<Run<C>> runs;
    runs.clear();
    return runs;
  }

  // What an output row reads, whose first tap is in the tile's row at `top`; the taps of a row of
  // the kernel are one run where they lie side by side.
  Runs<C> OutputRuns(const C* top) const {
    std::vector<Run<C>>& runs = EmptyRuns();
    int64_t together = g.dilation_w == 1 ? g.kernel_w : 1;
    for (int64_t a = 0; a < g.kernel_h; ++a) {
      for (int64_t b = 0; b < g.kernel_w; b += together) {
        runs.push_back({top + (a * g.dilation_h * tile_width + b * g.dilation_w) * g.in,
                        (a * g.kernel_w + b) * g.in, together * g.in});
      }
    }
    return {runs.data(), int64_t(runs.size()), g.stride_w * g.in};
  }

  // The taps that input row `row` and its columns phase, phase + stride_w, ... meet.
  Runs<C> GradientRuns(const C* tile, int64_t first_out, int64_t row, int64_t phase) const {
    std::vector<Run<C>>& runs = EmptyRuns();
    for (int64_t a = 0; a < g.kernel_h; ++a) {
      int64_t output = g.OutputRow(row, a);
      if (output < 0) continue;
      const C* line = tile + (output - first_out) * gradient_width * g.out;
      for (int64_t b = 0; b < g.kernel_w; ++b) {
        int64_t q = phase + g.left - b * g.dilation_w;
        if (q % g.stride_w) continue;
        runs.push_back({line + (gradient_left + q / g.stride_w) * g.out,
                        (a * g.kernel_w + b) * g.out, g.out});
      }
    }
    return {runs.data(), int64_t(runs.size()), g.out};
  }

  // The input rows that outputs first ... end - 1 read, with zeros around the image.
  const C* FillImage(const S* x, int64_t first, int64_t end, Scratch<C>& scratch) const {
    int64_t top = first * g.stride_h - g.top, input_end = top + g.InputRows(end - first);
    if constexpr (std::is_same_v<S, C>) {
      if (tile_width == g.w && top >= 0 && input_end <= g.h) return x + top * g.w * g.in;
    }
    return FillTile(x, g.h, g.w, g.in, top, input_end, {tile_width, g.left, g.in}, scratch.image);
  }

  const Geometry g;
  const int64_t padded_in, padded_out, taps, tile_width, gradient_left, gradient_width;
};

// y, and unless `mean` is null the mean and variance of its channels.
template <typename S, typename C>
void DenseForward(const Geometry& g, const S* x, const S* kernel, S* y, C* mean, C* variance,
                  const Parallel& parallel) {
  const DenseLayer<S, C> layer(g);
  const Buffer<C> panels = layer.Panels(kernel);
  const RowUnits units{g.n, g.out_h, layer.OutputRowsPerUnit(kTileBytes)};
  std::vector<Differences<C>> moments(mean ? units.Count() : 0, Differences<C>(layer.PaddedOut()));
  parallel(units.Count(), [&](int64_t unit) {
    auto [image, first, end] = units.At(unit);
    layer.Forward(x + image * g.InputSize(), panels.data(), first, end,
                  y + image * g.OutputSize(), mean ? &moments[unit] : nullptr);
  });
  if (mean) StoreMoments(moments, g.out, mean, variance);
}

template <typename S, typename C>
void DenseDataGradient(const Geometry& g, const S* kernel, const S* dy, S* dx,
                       const Parallel& parallel) {
  const DenseLayer<S, C> layer(g);
  const Buffer<C> panels = layer.TransposedPanels(kernel);
  const RowUnits units{g.n, g.h, layer.InputRowsPerUnit()};
  parallel(units.Count(), [&](int64_t unit) {
    auto [image, first, end] = units.At(unit);
    layer.DataGradient(dy + image * g.OutputSize(), panels.data(), first, end,
                       dx + image * g.InputSize());
  });
}

template <typename S, typename C>
void DenseKernelGradient(const Geometry& g, const S* x, const S* dy, S* dkernel,
                         const Parallel& parallel) {
  const DenseLayer<S, C> layer(g);
  const RowUnits units{g.n, g.out_h, layer.OutputRowsPerUnit(kLinesBytes)};
  Buffer<C> sum = SumOverGroups<C>(
      units.Count(), layer.KernelSize(), parallel, [&](int64_t unit, C* sum) {
        auto [image, first, end] = units.At(unit);
        layer.AddKernelGradient(x + image * g.InputSize(), dy + image * g.OutputSize(), first,
                                end, sum);
      });
  layer.StoreKernel(sum.data(), dkernel);
}

}  // namespace CHANSEL_TARGET
