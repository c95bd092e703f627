// KeySteps: how coarsely each element of keys is rounded, beside the others.
//
// A row's scale t is its largest |x_i / step_i| over 127, and its rounding has a mean square of t^2
// times the sum of step_i^2 / 12. Larger steps of an element that varies much make t smaller, and
// its own rounding coarser. fit() makes E[max_i (x_i / step_i)^2] times the sum of squares of steps
// least: in the optimum an element's share of that sum is its share of the rows' maxima, and steps
// are moved towards it. Maxima are softened to a norm of high order, so that each row tells of all
// its large elements.
//
// Threads: none of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace icecache {

class KeySteps {
 public:
  static constexpr std::int64_t kSample = 128;  // rows that tell enough

  // How much each element varies, its root mean square around the mean, [D].
  explicit KeySteps(std::span<const double> spread);
  // A row; x[i] - mean[i] counts.
  void add(std::span<const float> x, std::span<const double> mean);
  // Steps [D], about 1 for most elements.
  std::vector<float> fit() const;

 private:
  struct Scratch {
    std::vector<double> inverse, powers, shares;  // [D]
  };
  // Moves the steps' squares [D] towards the optimum.
  void improve(std::vector<double>& squares, Scratch& scratch) const;

  std::size_t dim_;
  double unit_;
  std::vector<double> start_, least_;  // [D] squares of steps, and steps
  std::vector<double> rows_;           // [n, D] squares in units of unit_
};

}  // namespace icecache
