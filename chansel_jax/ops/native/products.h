// Matrix products of rows of pixels, for one instruction set.
//
// This and the headers beside it are included several times by handlers.cc, each time with another
// CHANSEL_TARGET (a namespace) and CHANSEL_VECTOR_BYTES (what a register of that instruction set
// holds); so there are no include guards. Vectors are the compiler's own (GCC and Clang); no
// intrinsics.

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

// Stores, past the caches if STREAMED, to an address that then is a multiple of the vector's size.
template <bool STREAMED, typename C>
CHANSEL_INLINE void Put(const Vec<C>& from, C* to) {
#ifdef CHANSEL_X86
  if constexpr (STREAMED) {
    float* floats = reinterpret_cast<float*>(to);
#if CHANSEL_VECTOR_BYTES == 64
    return __builtin_ia32_movntps512(floats, Vec<float>(from));
#elif CHANSEL_VECTOR_BYTES == 32
    return __builtin_ia32_movntps256(floats, Vec<float>(from));
#else
    return __builtin_ia32_movntps(floats, Vec<float>(from));
#endif
  }
#endif
  Store(from, to);
}

// Whether rows of so many numbers from `to` on are whole lines that may be streamed, as a part of
// an array of so many bytes.
template <typename C>
bool Streams(const C* to, int64_t columns, int64_t array_bytes) {
  return array_bytes >= kStreamedBytes && columns * sizeof(C) % kLineBytes == 0 &&
         reinterpret_cast<uintptr_t>(to) % kLineBytes == 0;
}

// ---------------------------------------------------------------- mean and variance

// For each column of what one unit of work computes: a number near it (the first, then the mean of
// the last rows), and the sums of the differences to that and of their squares. Sums of squares of
// large numbers that hardly differ would cancel each other. After some rows they are folded into
// sums in float64 of the differences to the first number, so that rounding stays that of few pixels.
template <typename C>
struct Differences {
  explicit Differences(int64_t columns) : columns(columns), near(columns, C(0)),
      sums(2 * columns, C(0)), first(columns, 0.0), totals(2 * columns, 0.0) {}

  // Begins with the numbers that `near` holds.
  void Begin(int64_t column, int64_t count) {
    for (int64_t c = column; c < column + count; ++c) first[c] = near[c];
  }

  // Of the row that is the `number`th of a unit, so wide: folds where so many pixels were added since,
  // or it is the last.
  void FoldAfter(int64_t number, int64_t width, bool last, int64_t column, int64_t count) {
    const int64_t rows = std::max<int64_t>(1, kFoldedPixels / width), added = number % rows + 1;
    if (added == rows || last) Fold(column, count, added * width);
  }

  void Fold(int64_t column, int64_t count, int64_t added) {
    const double pixels = added, share = 1 / pixels;
    for (int64_t c = column; c < column + count; ++c) {
      const double apart = near[c] - first[c], sum = sums[c], squares = sums[columns + c];
      totals[c] += sum + pixels * apart;
      totals[columns + c] += squares + apart * (2 * sum + pixels * apart);
      near[c] += C(sum * share);
      sums[c] = sums[columns + c] = C(0);
    }
  }

  static constexpr int64_t kFoldedPixels = 256;
  int64_t columns, pixels = 0;
  Buffer<C> near, sums;
  std::vector<double> first, totals;
};

// Adds pixels of a panel, whose columns begin at `column`, to the sums.
template <int PIXELS, int VECTORS, typename C>
CHANSEL_INLINE void AddDifferences(const Vec<C> (&values)[PIXELS][VECTORS], int64_t column,
                                   Differences<C>& to) {
  const C* near = to.near.data() + column;
  C* sums = to.sums.data() + column;
  CHANSEL_UNROLL
  for (int v = 0; v < VECTORS; ++v, near += kLanes<C>, sums += kLanes<C>) {
    Vec<C> center, sum, squares, difference[PIXELS], square[PIXELS];
    Load(near, center);
    Load(sums, sum);
    Load(sums + to.columns, squares);
    // In pairs, since one addition awaits another.
    CHANSEL_UNROLL
    for (int p = 0; p < PIXELS; ++p) {
      difference[p] = values[p][v] - center;
      square[p] = difference[p] * difference[p];
    }
    CHANSEL_UNROLL
    for (int half = PIXELS / 2; half > 0; half /= 2) {
      CHANSEL_UNROLL
      for (int p = 0; p < half; ++p) {
        difference[p] += difference[p + half];
        square[p] += square[p + half];
      }
    }
    sum += difference[0];
    squares += square[0];
    Store(sum, sums);
    Store(squares, sums + to.columns);
  }
}

// Of so many pixels, from the sums of their differences to `near` and of these differences' squares.
template <typename C>
void StoreMoment(double near, double sum, double squares, double pixels, C* mean, C* variance) {
  const double shifted = sum / pixels, difference = squares / pixels - shifted * shifted;
  *mean = C(near + shifted);
  *variance = C(difference < 0 ? 0 : difference);  // what is not a number stays
}

// Mean and variance of each channel over all units, which are taken in order.
template <typename C>
void StoreMoments(const std::vector<Differences<C>>& units, int64_t channels, C* mean,
                  C* variance) {
  for (int64_t c = 0; c < channels; ++c) {
    const double near = units.empty() ? 0 : units[0].first[c];
    double sum = 0, squares = 0, pixels = 0;
    for (const Differences<C>& unit : units) {
      const double apart = unit.first[c] - near, of_unit = unit.totals[c], count = unit.pixels;
      sum += of_unit + count * apart;
      squares += unit.totals[unit.columns + c] + apart * (2 * of_unit + count * apart);
      pixels += count;
    }
    StoreMoment(near, sum, squares, pixels, mean + c, variance + c);
  }
}

// A block of sums that are added to at once: as many as the registers hold beside what is added
// (32 with 64-byte vectors, else 16), and enough for no addition to wait for the one before.
constexpr int kSums = CHANSEL_VECTOR_BYTES == 64 ? 16 : 8;

// ---------------------------------------------------------------- storage

// Rows of the arrays' own type as the type of computation: as they are where both are the same.
template <typename S, typename C>
const C* AsCompute(const S* from, int64_t count, Buffer<C>& scratch) {
  if constexpr (std::is_same_v<S, C>) {
    return from;
  } else {
    Grow(scratch, count);
    for (int64_t i = 0; i < count; ++i) scratch[i] = ToCompute(from[i]);
    return scratch.data();
  }
}

// Has write(to, streamed) compute rows of padded_columns, and stores the first `columns` of each in
// an array of so many bytes: directly where nothing is padded and no type differs.
template <typename S, typename C, typename Write>
void WriteRows(int64_t rows, int64_t columns, int64_t padded_columns, int64_t array_bytes,
               Buffer<C>& scratch, S* to, const Write& write) {
  if constexpr (std::is_same_v<S, C>) {
    if (columns == padded_columns) {
      return Streams(to, columns, array_bytes) ? write(to, std::true_type())
                                               : write(to, std::false_type());
    }
  }
  C* from = Grow(scratch, rows * padded_columns);
  write(from, std::false_type());
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

// What is read after this, asked for line by line while something else is computed: many lines at
// once would be waited for. They may lie beyond the end of an array.
class Ahead {
 public:
  template <typename S>
  void Add(const S* from, int64_t count) {
    ranges_[added_++] = {reinterpret_cast<const char*>(from),
                         CeilDiv(count * int64_t(sizeof(S)), kLineBytes)};
  }

  // The next lines, at most so many.
  struct Lines {
    const char* at;
    int64_t count;

    CHANSEL_INLINE void Ask(int64_t line) const {
      if (line < count) __builtin_prefetch(at + line * kLineBytes, 0, 2);
    }
  };

  Lines Take(int64_t most) {
    if (begun_ < added_ && !ranges_[begun_].count) ++begun_;
    if (begun_ == added_) return {nullptr, 0};
    Lines& from = ranges_[begun_];
    const Lines taken{from.at, std::min(most, from.count)};
    from.at += taken.count * kLineBytes;
    from.count -= taken.count;
    return taken;
  }

 private:
  Lines ranges_[2] = {};
  int added_ = 0, begun_ = 0;
};

// Pixels of a row, those of them that are zeros on the left, and numbers of a pixel.
struct TileShape {
  int64_t width, left, channels;
};

// Rows first ... end - 1 of an image (height, pixels, channels) with zeros around it.
template <typename S, typename C>
const C* FillTile(const S* image, int64_t height, int64_t pixels, int64_t channels, int64_t first,
                  int64_t end, TileShape shape, Buffer<C>& scratch) {
  int64_t width = shape.width * shape.channels;
  C* tile = Grow(scratch, std::max<int64_t>(0, end - first) * width);
  C* row = tile;
  for (int64_t i = first; i < end; ++i, row += width) {
    if (i < 0 || i >= height) {
      std::fill(row, row + width, C(0));
      continue;
    }
    C* to = row + shape.left * shape.channels;
    std::fill(row, to, C(0));
    PadRows(image + i * pixels * channels, pixels, channels, shape.channels, to);
    std::fill(to + pixels * shape.channels, row + width, C(0));
  }
  return tile;
}

// ---------------------------------------------------------------- products

// A matrix (depth, columns), columns whole vectors, lies in panels: of two vectors of columns, the
// last one perhaps of one, each contiguous over the depth. Where element (k, column) lies:
template <typename C>
int64_t PanelIndex(int64_t k, int64_t column, int64_t depth, int64_t columns) {
  constexpr int64_t kPanel = 2 * kLanes<C>;
  int64_t start = column / kPanel * kPanel;
  return start * depth + k * std::min(kPanel, columns - start) + column - start;
}

// Calls body(vectors, first column) for each panel.
template <typename C, typename Body>
CHANSEL_INLINE void ForPanels(int64_t columns, const Body& body) {
  constexpr int64_t kPanel = 2 * kLanes<C>;
  int64_t c = 0;
  for (; c + kPanel <= columns; c += kPanel) body(std::integral_constant<int, 2>(), c);
  if (c < columns) body(std::integral_constant<int, 1>(), c);
}

// A part of a product's depth: the factors of pixel p are the `depth` numbers from a[p * pitch] on,
// and meet the matrix's rows from `row` on.
template <typename C>
struct Run {
  const C* a;
  int64_t row, depth;
};

template <typename C>
struct Runs {
  const Run<C>* first;
  int64_t count, pitch;
};

// Whether so many vectors are whole lines: parts of them would be streamed one by one.
template <int VECTORS>
constexpr bool kWholeLines = VECTORS * CHANSEL_VECTOR_BYTES % kLineBytes == 0;

// out (PIXELS, VECTORS * lanes) = the sum of the runs' products with one panel, from pixel p on;
// MOMENTS adds them to the differences, where the panel's columns begin at `column`.
template <int PIXELS, int VECTORS, bool STREAMED, bool MOMENTS = false, typename C>
CHANSEL_INLINE void ProductBlock(const Runs<C>& runs, int64_t p, const C* panel, C* out,
                                 int64_t out_pitch, Differences<C>* moments = nullptr,
                                 int64_t column = 0) {
  Vec<C> sum[PIXELS][VECTORS] = {};
  const int64_t pitch = runs.pitch;
  for (const Run<C>* run = runs.first; run < runs.first + runs.count; ++run) {
    const C* a = run->a + p * pitch;
    const C* b = panel + run->row * VECTORS * kLanes<C>;
    for (int64_t k = 0; k < run->depth; ++k, ++a, b += VECTORS * kLanes<C>) {
      Vec<C> row[VECTORS];
      CHANSEL_UNROLL
      for (int v = 0; v < VECTORS; ++v) Load(b + v * kLanes<C>, row[v]);
      CHANSEL_UNROLL
      for (int i = 0; i < PIXELS; ++i) {
        CHANSEL_UNROLL
        for (int v = 0; v < VECTORS; ++v) sum[i][v] += a[i * pitch] * row[v];
      }
    }
  }
  CHANSEL_UNROLL
  for (int i = 0; i < PIXELS; ++i) {
    CHANSEL_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      Put<STREAMED && kWholeLines<VECTORS>>(sum[i][v], out + (p + i) * out_pitch + v * kLanes<C>);
    }
  }
  if constexpr (MOMENTS) AddDifferences<PIXELS, VECTORS>(sum, column, *moments);
}

// Pixels p ... pixels - 1, in blocks of PIXELS as long as they last, then of half as many, etc.
template <int PIXELS, int VECTORS, bool STREAMED, bool MOMENTS = false, typename C>
CHANSEL_INLINE void ProductPanel(const Runs<C>& runs, int64_t p, int64_t pixels, const C* panel,
                                 C* out, int64_t out_pitch, Differences<C>* moments = nullptr,
                                 int64_t column = 0) {
  for (; p + PIXELS <= pixels; p += PIXELS) {
    ProductBlock<PIXELS, VECTORS, STREAMED, MOMENTS>(runs, p, panel, out, out_pitch, moments,
                                                     column);
  }
  if constexpr (PIXELS > 1) {
    ProductPanel<PIXELS / 2, VECTORS, STREAMED, MOMENTS>(runs, p, pixels, panel, out, out_pitch,
                                                         moments, column);
  }
}

// out (pixels, columns) = a (pixels, depth) * the matrix (depth, columns) in panels.
template <bool STREAMED, typename C>
void Product(const C* a, int64_t pixels, int64_t depth, const C* panels, int64_t columns, C* out) {
  const Run<C> run{a, 0, depth};
  ForPanels<C>(columns, [&](auto vectors, int64_t c) {
    ProductPanel<kSums / vectors, vectors, STREAMED>(Runs<C>{&run, 1, depth}, 0, pixels,
                                                     panels + c * depth, out + c, columns);
  });
}

// Lines of pixels of two arrays.
template <typename C>
struct Lines {
  const C *a, *b;
  int64_t count, pixels, a_line, a_pitch, b_line, b_pitch;
};

// out (ROWS, VECTORS * lanes) += the sum over pixels of a (ROWS) times b (VECTORS * lanes), from
// that row of a and that column of b on.
template <int ROWS, int VECTORS, typename C>
CHANSEL_INLINE void OuterBlock(const Lines<C>& lines, int64_t row, int64_t column, C* out,
                               int64_t out_pitch) {
  Vec<C> sum[ROWS][VECTORS];
  CHANSEL_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    CHANSEL_UNROLL
    for (int v = 0; v < VECTORS; ++v) Load(out + i * out_pitch + v * kLanes<C>, sum[i][v]);
  }
  for (int64_t line = 0; line < lines.count; ++line) {
    const C* a = lines.a + line * lines.a_line + row;
    const C* b = lines.b + line * lines.b_line + column;
    for (int64_t p = 0; p < lines.pixels; ++p, a += lines.a_pitch, b += lines.b_pitch) {
      Vec<C> factor[VECTORS];
      CHANSEL_UNROLL
      for (int v = 0; v < VECTORS; ++v) Load(b + v * kLanes<C>, factor[v]);
      CHANSEL_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        CHANSEL_UNROLL
        for (int v = 0; v < VECTORS; ++v) sum[i][v] += a[i] * factor[v];
      }
    }
  }
  CHANSEL_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    CHANSEL_UNROLL
    for (int v = 0; v < VECTORS; ++v) Store(sum[i][v], out + i * out_pitch + v * kLanes<C>);
  }
}

template <int ROWS, int VECTORS, typename C>
CHANSEL_INLINE void OuterPanel(const Lines<C>& lines, int64_t row, int64_t rows, int64_t column,
                               C* out, int64_t out_pitch) {
  for (; row + ROWS <= rows; row += ROWS) {
    OuterBlock<ROWS, VECTORS>(lines, row, column, out + row * out_pitch + column, out_pitch);
  }
  if constexpr (ROWS > 1) {
    OuterPanel<ROWS / 2, VECTORS>(lines, row, rows, column, out, out_pitch);
  }
}

// out (rows, columns) += the sum over pixels of a (rows) times b (columns), columns whole vectors.
template <typename C>
void AddOuterProduct(const Lines<C>& lines, int64_t rows, int64_t columns, C* out) {
  ForPanels<C>(columns, [&](auto vectors, int64_t c) {
    OuterPanel<kSums / vectors, vectors>(lines, 0, rows, c, out, columns);
  });
}

// ---------------------------------------------------------------- sums over images

// The sum over units of what add(unit, sum) adds to `size` numbers. Units are taken in groups that
// do not depend on the number of threads, and the groups added in order, so that the sum is the
// same bit for bit however many there are.
template <typename C, typename Add>
Buffer<C> SumOverGroups(int64_t units, int64_t size, const Parallel& parallel, const Add& add) {
  int64_t fitting = kPartialBytes / (size * int64_t(sizeof(C)));
  int64_t groups = std::min(units, std::clamp(fitting, kFewestGroups, kMostGroups));
  groups = std::max<int64_t>(1, groups);  // whose sums are zero if there are no units
  Buffer<C> partial(groups * size);
  parallel(groups, [&](int64_t group) {
    int64_t end = (group + 1) * units / groups;
    for (int64_t unit = group * units / groups; unit < end; ++unit) {
      add(unit, partial.data() + group * size);
    }
  });
  constexpr int64_t kSlice = 4096;
  parallel(CeilDiv(size, kSlice), [&](int64_t slice) {
    int64_t end = std::min(size, (slice + 1) * kSlice);
    for (int64_t group = 1; group < groups; ++group) {
      for (int64_t i = slice * kSlice; i < end; ++i) partial[i] += partial[group * size + i];
    }
  });
  return partial;
}

}  // namespace CHANSEL_TARGET
