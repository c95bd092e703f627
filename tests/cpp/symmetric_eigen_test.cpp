#include "index/symmetric_eigen.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

namespace icecache::symmetric_eigen_test {
namespace {

std::vector<double> random_symmetric(int n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> matrix(static_cast<std::size_t>(n) * n);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; ++j) matrix[i * n + j] = matrix[j * n + i] = normal(random);
  }
  return matrix;
}

// A V = V diag(values), V orthonormal, values descending.
void expect_decomposition(const std::vector<double>& matrix, const SymmetricEigen& eigen, int n) {
  double scale = 1e-300;
  for (double x : matrix) scale = std::max(scale, std::abs(x));
  for (int a = 0; a < n; ++a) {
    EXPECT_GE(eigen.values[std::max(0, a - 1)], eigen.values[a]);
    double largest = 0.0;
    for (int i = 0; i < n; ++i) {
      double product = 0.0;
      for (int k = 0; k < n; ++k) product += matrix[i * n + k] * eigen.vectors[k * n + a];
      EXPECT_NEAR(product, eigen.values[a] * eigen.vectors[i * n + a], 1e-11 * n * scale);
      if (std::abs(eigen.vectors[i * n + a]) > std::abs(largest))
        largest = eigen.vectors[i * n + a];
    }
    EXPECT_GT(largest, 0.0);
    for (int b = 0; b < n; ++b) {
      double dot = 0.0;
      for (int k = 0; k < n; ++k) dot += eigen.vectors[k * n + a] * eigen.vectors[k * n + b];
      EXPECT_NEAR(dot, a == b ? 1.0 : 0.0, 1e-11 * n);
    }
  }
}

TEST(SymmetricEigen, DecomposesRandomMatrices) {
  for (int n : {1, 2, 3, 8, 64, 128}) {
    SCOPED_TRACE(n);
    const std::vector<double> matrix = random_symmetric(n, 7u + n);
    expect_decomposition(matrix, symmetric_eigen(matrix, n), n);
  }
}

TEST(SymmetricEigen, KnowsDiagonalZeroAndRepeated) {
  const SymmetricEigen diagonal = symmetric_eigen({1, 0, 0, 0, 5, 0, 0, 0, -2}, 3);
  EXPECT_EQ(diagonal.values, (std::vector<double>{5, 1, -2}));
  const SymmetricEigen zero = symmetric_eigen(std::vector<double>(16, 0.0), 4);
  EXPECT_EQ(zero.values, std::vector<double>(4, 0.0));
  expect_decomposition(std::vector<double>(16, 0.0), zero, 4);
  const std::vector<double> ones(64, 1.0);  // rank one: eigenvalue 8, and 0 seven times
  const SymmetricEigen repeated = symmetric_eigen(ones, 8);
  EXPECT_NEAR(repeated.values[0], 8.0, 1e-12);
  expect_decomposition(ones, repeated, 8);
}

// What is left after the first column is rounding, of any size.
TEST(SymmetricEigen, DecomposesMatricesOfRankOne) {
  for (const double size : {1e-70, 1.0, 1e9, 1e70}) {
    for (const int n : {3, 32, 128}) {
      SCOPED_TRACE(size);
      std::vector<double> matrix(static_cast<std::size_t>(n) * n);
      for (int i = 0; i < n; ++i) {
        for (int j = 0; j < n; ++j) matrix[i * n + j] = size * (1 + i % 3) * (1 + j % 3);
      }
      expect_decomposition(matrix, symmetric_eigen(matrix, n), n);
    }
  }
}

TEST(SymmetricEigen, SpansManyOrdersOfMagnitude) {
  std::vector<double> matrix = random_symmetric(16, 3);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) matrix[i * 16 + j] *= std::pow(10.0, -(i + j) / 2.0);
  }
  expect_decomposition(matrix, symmetric_eigen(matrix, 16), 16);
}

TEST(SymmetricEigen, ReadsOnlyTheLowerTriangle) {
  std::vector<double> matrix = random_symmetric(6, 5);
  const SymmetricEigen expected = symmetric_eigen(matrix, 6);
  for (int i = 0; i < 6; ++i) {
    for (int j = i + 1; j < 6; ++j) matrix[i * 6 + j] = NAN;
  }
  EXPECT_EQ(symmetric_eigen(matrix, 6).values, expected.values);
}

}  // namespace
}  // namespace icecache::symmetric_eigen_test
