// KeyRounding: how a row's numbers become codes so that the errors of its elements cancel in the
// logits of queries like those that were seen.
//
// Rounded one by one, elements have errors e that know nothing of each other, and a logit's error is
// q . e. Where M is the mean of q q^T over queries, the mean square of that error is e^T M e.
// Elements are rounded from the last to the first, each to the nearest number to what makes
// e^T (M + F) e least, those behind it being what they are: the nearest plane in the lattice of
// codes, or GPTQ's rounding (Frantar et al., 2023). M + F = L L^T, so that element k's number moves
// by the sum over i > k of L_ik / L_kk e_i.
//
// F is M's mean diagonal in all directions. So e^T F e, what a query of any other kind sees, is at
// most twice that of elements rounded one by one on average: sum of L_ii^2 <= sum of (M + F)_ii.
//
// Threads: a value.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace icecache {

class KeyRounding {
 public:
  // `second` [D, D]: mean of q q^T. `step` [D]: numbers are in units of it.
  KeyRounding(std::span<const double> second, std::span<const float> step);

  // codes[i] from -most to most for numbers x [D].
  void round(std::span<const double> x, double most, std::int8_t* codes) const;

 private:
  std::vector<float> carry_;  // [D, D] row i: L_ik / L_kk for k < i
};

// To the nearest whole number, ties to even. REQUIRES: |x| < 2^22.
std::int8_t nearest_code(double x);

}  // namespace icecache
