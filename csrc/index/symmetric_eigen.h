// Eigenvalues and eigenvectors of a real symmetric matrix, in double: Householder reduction to
// tridiagonal form and the implicit QL method (Wilkinson & Reinsch, Handbook for Automatic
// Computation II, 1971). O(n^3); n is a head dim.
#pragma once

#include <vector>

namespace icecache {

struct SymmetricEigen {
  std::vector<double> values;   // [n], descending
  std::vector<double> vectors;  // [n, n] row-major; column j belongs to values[j]; signs: the entry
                                // of largest magnitude of each column is positive
};

// matrix: [n, n] row-major, finite; only the lower triangle is read.
SymmetricEigen symmetric_eigen(const std::vector<double>& matrix, int n);

}  // namespace icecache
