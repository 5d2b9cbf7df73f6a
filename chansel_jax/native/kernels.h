// Channel selection, pointwise and depthwise fused in cache, for one instruction set.
//
// Included several times by handlers.cc, each time with another CHANSEL_TARGET (a namespace) and
// CHANSEL_VECTOR_BYTES (what a register of that instruction set holds); so there is no include
// guard. Vectors are the compiler's own (GCC and Clang); no intrinsics.
//
// Within a tile, the M = C_out * R weighted sums of a pixel lie rank by rank, and the output
// channels of each rank are padded with zeros to a whole number of vectors:
//   column(r, o) = r * padded_out + o
// so that every inner loop runs over whole vectors.

namespace CHANSEL_TARGET {

// ---------------------------------------------------------------- vectors

template <typename C>
struct Vector {
  typedef C type __attribute__((vector_size(CHANSEL_VECTOR_BYTES)));
  typedef C unaligned __attribute__((vector_size(CHANSEL_VECTOR_BYTES), aligned(alignof(C)),
                                     may_alias));
};

template <typename C>
constexpr int64_t kLanes = CHANSEL_VECTOR_BYTES / sizeof(C);

template <typename C>
using Vec = typename Vector<C>::type;

template <typename C>
CHANSEL_INLINE void Load(const C* from, Vec<C>& to) {
  to = *reinterpret_cast<const typename Vector<C>::unaligned*>(from);
}

template <typename C>
CHANSEL_INLINE void Store(const Vec<C>& from, C* to) {
  *reinterpret_cast<typename Vector<C>::unaligned*>(to) = from;
}

// Registers are 32 with 64-byte vectors, else 16: how many pixels a block of accumulators spans.
constexpr int kBlock = CHANSEL_VECTOR_BYTES == 64 ? 8 : 4;

// ---------------------------------------------------------------- storage

// Rows of the arrays' own type as the type of computation: as they are where both are the same.
template <typename S, typename C>
const C* AsCompute(const S* from, int64_t count, std::vector<C>& scratch) {
  if constexpr (std::is_same_v<S, C>) {
    return from;
  } else {
    Grow(scratch, count);
    for (int64_t i = 0; i < count; ++i) scratch[i] = ToCompute(from[i]);
    return scratch.data();
  }
}

// Has write(rows) compute rows of padded_columns, and stores the first `columns` of each: directly
// where nothing is padded and no type differs.
template <typename S, typename C, typename Write>
void WriteRows(int64_t rows, int64_t columns, int64_t padded_columns, std::vector<C>& scratch,
               S* to, const Write& write) {
  if constexpr (std::is_same_v<S, C>) {
    if (columns == padded_columns) return write(to);
  }
  C* from = Grow(scratch, rows * padded_columns);
  write(from);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < columns; ++i) {
      to[row * columns + i] = ToStorage<S>(from[row * padded_columns + i]);
    }
  }
}

// Rows of `columns` as rows of padded_columns, zero beyond.
template <typename S, typename C>
void PadRows(const S* from, int64_t rows, int64_t columns, int64_t padded_columns, C* to) {
  if constexpr (std::is_same_v<S, C>) {
    if (columns == padded_columns) {
      std::copy(from, from + rows * columns, to);
      return;
    }
  }
  for (int64_t row = 0; row < rows; ++row, from += columns, to += padded_columns) {
    for (int64_t i = 0; i < columns; ++i) to[i] = ToCompute(from[i]);
    std::fill(to + columns, to + padded_columns, C(0));
  }
}

// ---------------------------------------------------------------- matrix products

// out (PIXELS, VECTORS * lanes) = a (PIXELS, depth) * b (depth, VECTORS * lanes)
template <int PIXELS, int VECTORS, typename C>
CHANSEL_INLINE void ProductBlock(const C* a, int64_t a_pitch, const C* b, int64_t depth, C* out,
                                 int64_t out_pitch) {
  Vec<C> sum[PIXELS][VECTORS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<C> row[VECTORS];
    CHANSEL_UNROLL
    for (int v = 0; v < VECTORS; ++v) Load(b + (k * VECTORS + v) * kLanes<C>, row[v]);
    CHANSEL_UNROLL
    for (int p = 0; p < PIXELS; ++p) {
      CHANSEL_UNROLL
      for (int v = 0; v < VECTORS; ++v) sum[p][v] += a[p * a_pitch + k] * row[v];
    }
  }
  CHANSEL_UNROLL
  for (int p = 0; p < PIXELS; ++p) {
    CHANSEL_UNROLL
    for (int v = 0; v < VECTORS; ++v) Store(sum[p][v], out + p * out_pitch + v * kLanes<C>);
  }
}

// In blocks of PIXELS as long as they last, then of half as many, and so on.
template <int PIXELS, int VECTORS, typename C>
CHANSEL_INLINE void ProductPanel(const C* a, int64_t a_pitch, int64_t pixels, const C* b,
                                 int64_t depth, C* out, int64_t out_pitch) {
  int64_t p = 0;
  for (; p + PIXELS <= pixels; p += PIXELS) {
    ProductBlock<PIXELS, VECTORS>(a + p * a_pitch, a_pitch, b, depth, out + p * out_pitch,
                                  out_pitch);
  }
  if constexpr (PIXELS > 1) {
    ProductPanel<PIXELS / 2, VECTORS>(a + p * a_pitch, a_pitch, pixels - p, b, depth,
                                      out + p * out_pitch, out_pitch);
  }
}

// out (pixels, columns) = a (pixels, depth) * panels (depth, columns), columns whole vectors.
// A panel holds two vectors of columns, the last one perhaps one, contiguous over the depth.
template <typename C>
void Product(const C* a, int64_t a_pitch, int64_t pixels, const C* panels, int64_t depth,
             int64_t columns, C* out, int64_t out_pitch) {
  constexpr int64_t kPanel = 2 * kLanes<C>;
  int64_t c = 0;
  for (; c + kPanel <= columns; c += kPanel) {
    ProductPanel<kBlock, 2>(a, a_pitch, pixels, panels + c * depth, depth, out + c, out_pitch);
  }
  if (c < columns) {
    ProductPanel<kBlock, 1>(a, a_pitch, pixels, panels + c * depth, depth, out + c, out_pitch);
  }
}

// Where element (k, column) of a matrix (depth, columns) lies in its panels.
template <typename C>
int64_t PanelIndex(int64_t k, int64_t column, int64_t depth, int64_t columns) {
  constexpr int64_t kPanel = 2 * kLanes<C>;
  int64_t start = column / kPanel * kPanel;
  return start * depth + k * std::min(kPanel, columns - start) + column - start;
}

// sum (ROWS, VECTORS * lanes) += transposed a (pixels, ROWS) * b (pixels, VECTORS * lanes)
template <int ROWS, int VECTORS, typename C>
CHANSEL_INLINE void OuterBlock(const C* a, int64_t a_pitch, const C* b, int64_t b_pitch,
                               int64_t pixels, C* out, int64_t out_pitch) {
  Vec<C> sum[ROWS][VECTORS];
  CHANSEL_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    CHANSEL_UNROLL
    for (int v = 0; v < VECTORS; ++v) Load(out + i * out_pitch + v * kLanes<C>, sum[i][v]);
  }
  for (int64_t p = 0; p < pixels; ++p) {
    Vec<C> row[VECTORS];
    CHANSEL_UNROLL
    for (int v = 0; v < VECTORS; ++v) Load(b + p * b_pitch + v * kLanes<C>, row[v]);
    CHANSEL_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      CHANSEL_UNROLL
      for (int v = 0; v < VECTORS; ++v) sum[i][v] += a[p * a_pitch + i] * row[v];
    }
  }
  CHANSEL_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    CHANSEL_UNROLL
    for (int v = 0; v < VECTORS; ++v) Store(sum[i][v], out + i * out_pitch + v * kLanes<C>);
  }
}

// out (rows, columns) += transposed a (pixels, rows) * b (pixels, columns), columns whole vectors.
template <typename C>
void AddOuterProduct(const C* a, int64_t rows, const C* b, int64_t b_pitch, int64_t columns,
                     int64_t pixels, C* out) {
  for (int64_t c = 0; c < columns;) {
    bool two = c + 2 * kLanes<C> <= columns;
    int64_t i = 0;
    for (; i + kBlock <= rows; i += kBlock) {
      C* to = out + i * columns + c;
      two ? OuterBlock<kBlock, 2>(a + i, rows, b + c, b_pitch, pixels, to, columns)
          : OuterBlock<kBlock, 1>(a + i, rows, b + c, b_pitch, pixels, to, columns);
    }
    for (; i < rows; ++i) {
      C* to = out + i * columns + c;
      two ? OuterBlock<1, 2>(a + i, rows, b + c, b_pitch, pixels, to, columns)
          : OuterBlock<1, 1>(a + i, rows, b + c, b_pitch, pixels, to, columns);
    }
    c += (two ? 2 : 1) * kLanes<C>;
  }
}

// ---------------------------------------------------------------- one layer

template <typename S, typename C>
class Layer {
 public:
  Layer(const Geometry& geometry, const S* pointwise, const S* depthwise)
      : g(geometry),
        padded_in(RoundUp(g.in, kLanes<C>)),
        padded_out(RoundUp(g.out, kLanes<C>)),
        sums(g.rank * padded_out),
        // The columns of a tile: those that any tap reads, and those of the image.
        tile_width(std::max((g.out_w - 1) * g.stride_w + (g.kernel_w - 1) * g.dilation_w + 1,
                            g.left + g.w)) {
    PackPointwise(pointwise);
    PackDepthwise(depthwise);
  }

  // Output rows that are computed at once: their tile of weighted sums should stay in cache.
  int64_t OutputRowsPerUnit() const {
    int64_t input_rows = kTileBytes / (tile_width * sums * sizeof(C));
    int64_t rows = (input_rows - (g.kernel_h - 1) * g.dilation_h) / g.stride_h;
    return std::clamp(rows, std::min<int64_t>(4, g.out_h), g.out_h);
  }

  int64_t InputRowsPerUnit() const {
    int64_t rows = kTileBytes / (tile_width * sums * sizeof(C));
    return std::clamp(rows, std::min<int64_t>(4, g.h), g.h);
  }

  // y[:, first:last] of one image.
  void Forward(const S* x, int64_t first, int64_t last, S* y) const {
    Scratch<C>& scratch = ThreadScratch<C>();
    int64_t top = first * g.stride_h - g.top;
    int64_t rows = (last - 1 - first) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1;
    FillSums(x, top, rows, scratch);
    for (int64_t i = first; i < last; ++i) {
      const C* tile = scratch.sums.data() + (i - first) * g.stride_h * tile_width * sums;
      WriteRows<S, C>(g.out_w, g.out, padded_out, scratch.line, y + i * g.out_w * g.out,
                      [&](C* line) {
                        for (int64_t o = 0; o < padded_out; o += kLanes<C>) {
                          DepthwiseRow(tile, o, line + o);
                        }
                      });
    }
  }

  // dx[:, first:last] of one image, and what these rows add to the gradients of both kernels:
  // pointwise_sum (in, sums) and depthwise_sum (kernel_h, kernel_w, sums).
  void Backward(const S* x, const S* dy, int64_t first, int64_t last, S* dx, C* pointwise_sum,
                C* depthwise_sum) const {
    Scratch<C>& scratch = ThreadScratch<C>();
    FillSums(x, first, last - first, scratch);
    int64_t first_out = std::max<int64_t>(
        0, CeilDiv(first + g.top - (g.kernel_h - 1) * g.dilation_h, g.stride_h));
    int64_t last_out = std::min(g.out_h, (last - 1 + g.top) / g.stride_h + 1);
    FillOutputGradient(dy, first_out, last_out, scratch);
    C* dz = Grow(scratch.sums_gradient, (last - first) * g.w * sums);
    for (int64_t row = first; row < last; ++row) {
      const C* z = scratch.sums.data() + (row - first) * tile_width * sums;
      C* dz_row = dz + (row - first) * g.w * sums;
      const C* const* dy_rows = GradientRows(row, first_out, scratch);
      if (g.stride_w > 1) std::fill(dz_row, dz_row + g.w * sums, C(0));
      for (int64_t column = 0; column < sums; column += kLanes<C>) {
        SumsGradientRow(dy_rows, column, dz_row + column);
        AddDepthwiseGradient(dy_rows, column, z + column, depthwise_sum);
      }
    }
    int64_t pixels = (last - first) * g.w;
    const C* image = AsCompute(x + first * g.w * g.in, pixels * g.in, scratch.image);
    AddOuterProduct(image, g.in, dz, sums, sums, pixels, pointwise_sum);
    WriteRows<S, C>(pixels, g.in, padded_in, scratch.image_gradient, dx + first * g.w * g.in,
                    [&](C* rows) {
                      Product(dz, sums, pixels, transposed_pointwise.data(), sums, padded_in, rows,
                              padded_in);
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
      Product(pixels, g.in, g.w, panels.data(), g.in, sums, image, sums);
    }
  }

  // How far the columns of the output's gradient are moved to the right in its tile, so that every
  // tap of every pixel finds a column.
  int64_t GradientLeft() const {
    return std::max<int64_t>(0, (g.kernel_w - 1) * g.dilation_w - g.left);
  }

  int64_t GradientWidth() const { return GradientLeft() + std::max(g.out_w, g.w + g.left); }

  // Rows first ... last - 1 of the output's gradient, with zeros to the left and to the right.
  void FillOutputGradient(const S* dy, int64_t first, int64_t last, Scratch<C>& scratch) const {
    int64_t width = GradientWidth() * padded_out;
    C* tile = Grow(scratch.output_gradient, std::max<int64_t>(0, last - first) * width);
    for (int64_t i = first; i < last; ++i, tile += width) {
      const S* from = dy + i * g.out_w * g.out;
      C* to = tile + GradientLeft() * padded_out;
      std::fill(tile, to, C(0));
      std::fill(to + g.out_w * padded_out, tile + width, C(0));
      PadRows(from, g.out_w, g.out, padded_out, to);
    }
  }

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
      int64_t offset = row + g.top - a * g.dilation_h;
      bool meets = offset >= 0 && offset % g.stride_h == 0 && offset / g.stride_h < g.out_h;
      int64_t line = (offset / g.stride_h - first_out) * GradientWidth() + GradientLeft();
      rows[a] = meets ? scratch.output_gradient.data() + line * padded_out : nullptr;
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
void Forward(const Geometry& g, const S* x, const S* pointwise, const S* depthwise, S* y,
             const Parallel& parallel) {
  const Layer<S, C> layer(g, pointwise, depthwise);
  int64_t rows = layer.OutputRowsPerUnit();
  int64_t units = CeilDiv(g.out_h, rows);
  parallel(g.n * units, [&](int64_t unit) {
    int64_t image = unit / units, first = unit % units * rows;
    layer.Forward(x + image * g.h * g.w * g.in, first, std::min(first + rows, g.out_h),
                  y + image * g.out_h * g.out_w * g.out);
  });
}

// The sum over units of what add(unit, sum) adds to `size` numbers. Units are taken in groups that do
// not depend on the number of threads, and the groups added in order, so that the sum is the same
// bit for bit however many there are.
template <typename C, typename Add>
std::vector<C> SumOverGroups(int64_t units, int64_t size, const Parallel& parallel,
                             const Add& add) {
  int64_t fitting = kPartialBytes / (size * int64_t(sizeof(C)));
  int64_t groups = std::min(units, std::clamp(fitting, kFewestGroups, kMostGroups));
  groups = std::max<int64_t>(1, groups);  // whose sums are zero if there are no units
  std::vector<C> partial(groups * size);
  parallel(groups, [&](int64_t group) {
    int64_t last = (group + 1) * units / groups;
    for (int64_t unit = group * units / groups; unit < last; ++unit) {
      add(unit, partial.data() + group * size);
    }
  });
  constexpr int64_t kSlice = 4096;
  parallel(CeilDiv(size, kSlice), [&](int64_t slice) {
    int64_t last = std::min(size, (slice + 1) * kSlice);
    for (int64_t group = 1; group < groups; ++group) {
      for (int64_t i = slice * kSlice; i < last; ++i) partial[i] += partial[group * size + i];
    }
  });
  return partial;
}

template <typename S, typename C>
void Backward(const Geometry& g, const S* x, const S* pointwise, const S* depthwise, const S* dy,
              S* dx, S* dpointwise, S* ddepthwise, const Parallel& parallel) {
  const Layer<S, C> layer(g, pointwise, depthwise);
  int64_t rows = std::max<int64_t>(1, layer.InputRowsPerUnit());  // none, in empty images
  int64_t units = CeilDiv(g.h, rows);
  std::vector<C> sum = SumOverGroups<C>(
      g.n * units, layer.PointwiseSize() + layer.DepthwiseSize(), parallel,
      [&](int64_t unit, C* sum) {
        int64_t image = unit / units, row = unit % units * rows;
        layer.Backward(x + image * g.h * g.w * g.in, dy + image * g.out_h * g.out_w * g.out, row,
                       std::min(row + rows, g.h), dx + image * g.h * g.w * g.in, sum,
                       sum + layer.PointwiseSize());
      });
  layer.StorePointwise(sum.data(), dpointwise);
  layer.StoreDepthwise(sum.data() + layer.PointwiseSize(), ddepthwise);
}

}  // namespace CHANSEL_TARGET
