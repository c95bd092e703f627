#include "simd/key_steps.h"

#include <algorithm>
#include <cmath>

namespace icecache {
namespace {

constexpr int kHalfOrder = 8;  // of the norm, which is one of squares
constexpr int kRounds = 12;
// Fewer rows do not tell how elements vary together: then steps follow each one's own spread.
constexpr std::size_t kFewRows = 64;
// An element's step is at least its spread over this many: else those that vary far more than the
// others, which queries may hardly look at, would take all precision.
constexpr double kOutlier = 3.0;
// An element that hardly varied among the tokens of the fit may vary later: what it then takes of
// the others' precision is bounded.
constexpr double kLeastStep = 0.5;
// Against the root mean square: where most elements do not vary at all.
constexpr double kLeastUnit = 1e-6;

double power_of_order(double x) {
  const double x2 = x * x, x4 = x2 * x2;
  static_assert(kHalfOrder == 8);
  return x4 * x4;
}

}  // namespace

KeySteps::KeySteps(std::span<const double> spread) : dim_(spread.size()) {
  double all = 0.0;
  for (const double x : spread) all += x * x / static_cast<double>(dim_);
  std::vector<double> sorted(spread.begin(), spread.end());
  const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>(dim_ / 2);
  std::nth_element(sorted.begin(), middle, sorted.end());
  unit_ = std::max(*middle, kLeastUnit * std::sqrt(all));
  for (const double x : spread) {
    const double ratio = unit_ > 0.0 ? x / unit_ : 1.0;
    least_.push_back(std::max(ratio / kOutlier, kLeastStep));
    start_.push_back(std::max(ratio, least_.back() * least_.back()));
  }
}

void KeySteps::add(std::span<const float> x, std::span<const double> mean) {
  if (!(unit_ > 0.0)) return;
  for (std::size_t i = 0; i < dim_; ++i) {
    const double off = (x[i] - mean[i]) / unit_;
    rows_.push_back(off * off);
  }
}

void KeySteps::improve(std::vector<double>& squares, Scratch& scratch) const {
  auto& [inverse, powers, shares] = scratch;
  std::fill(shares.begin(), shares.end(), 0.0);
  double sum_of_squares = 0.0, all_shares = 0.0;
  for (std::size_t i = 0; i < dim_; ++i) {
    sum_of_squares += squares[i];
    inverse[i] = 1.0 / squares[i];
  }
  for (std::size_t at = 0; at < rows_.size(); at += dim_) {
    const double* row = rows_.data() + at;
    double largest = 0.0, total = 0.0;
    for (std::size_t i = 0; i < dim_; ++i) {
      powers[i] = row[i] * inverse[i];
      largest = std::max(largest, powers[i]);
    }
    if (!(largest > 0.0)) continue;
    const double unit = 1.0 / largest;
    for (std::size_t i = 0; i < dim_; ++i) powers[i] = power_of_order(powers[i] * unit);
    for (std::size_t i = 0; i < dim_; ++i) total += powers[i];
    const double norm = largest * std::pow(total, 1.0 / kHalfOrder);
    for (std::size_t i = 0; i < dim_; ++i) shares[i] += norm / total * powers[i];
    all_shares += norm;
  }
  if (!(all_shares > 0.0)) return;
  for (std::size_t i = 0; i < dim_; ++i) {
    // A share is as a power -kHalfOrder of the square: this lands on the optimum if others stay.
    const double wanted = shares[i] / all_shares * sum_of_squares * inverse[i];
    squares[i] *= std::pow(std::max(wanted, 1e-6), 1.0 / (kHalfOrder + 1));
  }
}

std::vector<float> KeySteps::fit() const {
  std::vector<double> squares = start_, zeros(dim_, 0.0);
  Scratch scratch{zeros, zeros, zeros};
  if (rows_.size() / dim_ >= kFewRows) {
    for (int round = 0; round < kRounds; ++round) improve(squares, scratch);
  }
  std::vector<double> sorted = squares;
  const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>(dim_ / 2);
  std::nth_element(sorted.begin(), middle, sorted.end());
  std::vector<float> steps;
  for (std::size_t i = 0; i < dim_; ++i) {
    steps.push_back(static_cast<float>(std::max(std::sqrt(squares[i] / *middle), least_[i])));
  }
  return steps;
}

}  // namespace icecache
