#include "index/symmetric_eigen.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "index/magnitude.h"

namespace icecache {
namespace {

// y[j] += f x[j] for j in [from, to).
void add_row(double f, const double* __restrict x, double* __restrict y, int from, int to) {
  for (int j = from; j < to; ++j) y[j] += f * x[j];
}

// Reduces a (row-major, symmetric) to tridiagonal form with diagonal d and subdiagonal e[1..n-1].
// Returns the transpose of the orthogonal Q with A = Q T Q^T. All loops go along rows.
std::vector<double> tridiagonalise(std::vector<double>& a, int n, std::vector<double>& d,
                                   std::vector<double>& e) {
  std::vector<double> v(n), w(n);
  std::vector<double> qt(static_cast<std::size_t>(n) * n, 0.0);
  for (int i = 0; i < n; ++i) qt[i * n + i] = 1.0;
  double largest = 0.0;
  for (const double x : a) largest = std::max(largest, std::abs(x));
  constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
  for (int k = 0; k + 2 < n; ++k) {
    double norm = 0.0;
    for (int i = k + 1; i < n; ++i) norm += a[i * n + k] * a[i * n + k];
    norm = std::sqrt(norm);
    if (norm <= kEpsilon * kEpsilon * largest) continue;  // rounding alone
    const double alpha = a[(k + 1) * n + k] > 0.0 ? -norm : norm;
    double length = 0.0;
    for (int i = k + 1; i < n; ++i) {
      v[i] = a[i * n + k] - (i == k + 1 ? alpha : 0.0);
      length += v[i] * v[i];
    }
    if (length == 0.0) continue;
    const double beta = 2.0 / length;
    // A <- H A H with H = I - beta v v^T, by the symmetric rank-two update.
    std::fill(w.begin(), w.end(), 0.0);
    for (int j = k + 1; j < n; ++j) add_row(beta * v[j], &a[j * n], w.data(), k + 1, n);
    double inner = 0.0;
    for (int i = k + 1; i < n; ++i) inner += w[i] * v[i];
    add_row(-0.5 * beta * inner, v.data(), w.data(), k + 1, n);
    for (int i = k + 1; i < n; ++i) {
      add_row(-v[i], w.data(), &a[i * n], k + 1, n);
      add_row(-w[i], v.data(), &a[i * n], k + 1, n);
    }
    a[(k + 1) * n + k] = a[k * n + k + 1] = alpha;
    for (int i = k + 2; i < n; ++i) a[i * n + k] = a[k * n + i] = 0.0;
    // Q <- Q H.
    std::fill(w.begin(), w.end(), 0.0);
    for (int j = k + 1; j < n; ++j) add_row(v[j], &qt[j * n], w.data(), 0, n);
    for (int j = k + 1; j < n; ++j) add_row(-beta * v[j], w.data(), &qt[j * n], 0, n);
  }
  for (int i = 0; i < n; ++i) {
    d[i] = a[i * n + i];
    e[i] = i > 0 ? a[i * n + i - 1] : 0.0;
  }
  return qt;
}

// QL with implicit shifts on (d, e); the rotations are applied to the rows of qt [n, n].
void implicit_ql(std::vector<double>& d, std::vector<double>& e, std::vector<double>& qt, int n) {
  for (int i = 1; i < n; ++i) e[i - 1] = e[i];
  e[n - 1] = 0.0;
  for (int l = 0; l < n; ++l) {
    for (int sweep = 0; sweep < 60; ++sweep) {
      int m = l;
      for (; m + 1 < n; ++m) {
        const double scale = std::abs(d[m]) + std::abs(d[m + 1]);
        if (std::abs(e[m]) <= std::numeric_limits<double>::epsilon() * scale) break;
      }
      if (m == l) break;
      double g = (d[l + 1] - d[l]) / (2.0 * e[l]);
      double r = std::sqrt(g * g + 1.0);
      g = d[m] - d[l] + e[l] / (g + std::copysign(r, g));
      double s = 1.0, c = 1.0, p = 0.0;
      int i = m - 1;
      for (; i >= l; --i) {
        double f = s * e[i];
        const double b = c * e[i];
        r = std::sqrt(f * f + g * g);
        e[i + 1] = r;
        if (r == 0.0) {
          d[i + 1] -= p;
          e[m] = 0.0;
          break;
        }
        s = f / r;
        c = g / r;
        g = d[i + 1] - p;
        r = (d[i] - g) * s + 2.0 * c * b;
        p = s * r;
        d[i + 1] = g + p;
        g = c * r - b;
        double* low = qt.data() + static_cast<std::size_t>(i) * n;
        double* high = low + n;
        for (int k = 0; k < n; ++k) {
          const double x = high[k];
          high[k] = s * low[k] + c * x;
          low[k] = c * low[k] - s * x;
        }
      }
      if (r == 0.0 && i >= l) continue;
      d[l] -= p;
      e[l] = g;
      e[m] = 0.0;
    }
  }
}

}  // namespace

SymmetricEigen symmetric_eigen(const std::vector<double>& matrix, int n) {
  std::vector<double> a(matrix);
  double largest = 0.0;
  for (int i = 0; i < n; ++i) {
    for (int j = i + 1; j < n; ++j) a[i * n + j] = a[j * n + i];
    for (int j = 0; j <= i; ++j) largest = std::max(largest, std::abs(a[i * n + j]));
  }
  // Squares of elements, and these divided by others, are numbers.
  const int exponent = far_exponent(largest, 200);
  for (double& x : a) x = std::ldexp(x, -exponent);
  std::vector<double> d(n), e(n);
  std::vector<double> qt = tridiagonalise(a, n, d, e);  // eigenvectors will be rows
  implicit_ql(d, e, qt, n);

  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return d[x] > d[y]; });
  SymmetricEigen result;
  result.values.resize(n);
  result.vectors.resize(a.size());
  for (int j = 0; j < n; ++j) {
    const double* row = qt.data() + static_cast<std::size_t>(order[j]) * n;
    const double* peak = std::max_element(
        row, row + n, [](double x, double y) { return std::abs(x) < std::abs(y); });
    const double sign = *peak < 0.0 ? -1.0 : 1.0;
    result.values[j] = std::ldexp(d[order[j]], exponent);
    for (int i = 0; i < n; ++i) result.vectors[i * n + j] = sign * row[i];
  }
  return result;
}

}  // namespace icecache
