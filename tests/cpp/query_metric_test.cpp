#include "index/query_metric.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

namespace icecache::query_metric_test {
namespace {

std::vector<float> normal_rows(std::int64_t n, int d, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(static_cast<std::size_t>(n) * d);
  for (float& x : rows) x = normal(random);
  return rows;
}

double dot(const float* a, const float* b, int n) {
  double sum = 0.0;
  for (int i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

// E over pairs of ((q.k - estimate) / spread of q.k)^2.
double logit_error(const QueryMetric& metric, const std::vector<float>& keys,
                   const std::vector<float>& queries) {
  const int d = metric.head_dim, r = metric.rank;
  const int n = static_cast<int>(keys.size()) / d, m = static_cast<int>(queries.size()) / d;
  std::vector<float> y(static_cast<std::size_t>(n) * r);
  metric.coordinates(keys.data(), n, y.data());
  double error = 0.0, spread = 0.0;
  for (int j = 0; j < m; ++j) {
    const float* q = queries.data() + j * d;
    std::vector<float> projected(r);
    for (int a = 0; a < r; ++a) {
      for (int i = 0; i < d; ++i) projected[a] += q[i] * metric.from_query[i * r + a];
    }
    const double offset = dot(q, metric.mean.data(), d);
    for (int i = 0; i < n; ++i) {
      const double logit = dot(q, keys.data() + i * d, d);
      const double estimate = offset + dot(projected.data(), y.data() + i * r, r);
      error += (logit - estimate) * (logit - estimate);
      spread += (logit - offset) * (logit - offset);
    }
  }
  return error / spread;
}

TEST(QueryMetric, FullRankReproducesEveryLogit) {
  const int d = 24;
  const std::vector<float> keys = normal_rows(500, d, 1), queries = normal_rows(64, d, 2);
  QueryMoments moments;
  moments.observe(queries.data(), 64, d);
  EXPECT_LT(logit_error(QueryMetric::fit(keys.data(), 500, d, moments, d), keys, queries), 1e-8);
  EXPECT_LT(logit_error(QueryMetric::fit(keys.data(), 500, d, {}, d), keys, queries), 1e-8);
}

TEST(QueryMetric, DistancesAreWhatQueriesTellApart) {
  const int d = 16, n = 50, m = 256;
  const std::vector<float> keys = normal_rows(n, d, 3);
  std::vector<float> queries = normal_rows(m, d, 4);
  for (int j = 0; j < m; ++j) {
    for (int i = 0; i < d; ++i) queries[j * d + i] *= 1.0f + static_cast<float>(i);
  }
  QueryMoments moments;
  moments.observe(queries.data(), m, d);
  const QueryMetric metric = QueryMetric::fit(keys.data(), n, d, moments, d);
  std::vector<float> y(static_cast<std::size_t>(n) * d);
  metric.coordinates(keys.data(), n, y.data());
  for (int a = 0; a < n; ++a) {
    const int b = (a + 7) % n;
    double distance = 0.0, seen = 0.0;
    for (int i = 0; i < d; ++i) distance += std::pow(y[a * d + i] - y[b * d + i], 2.0);
    for (int j = 0; j < m; ++j) {
      const double difference =
          dot(&queries[j * d], &keys[a * d], d) - dot(&queries[j * d], &keys[b * d], d);
      seen += difference * difference / m;
    }
    // All directions count a little, whatever queries see.
    double second = 0.0, apart = 0.0;
    for (const float x : queries) second += static_cast<double>(x) * x / (m * d);
    for (int i = 0; i < d; ++i) apart += std::pow(keys[a * d + i] - keys[b * d + i], 2.0);
    seen += 0.03 * second * apart;
    EXPECT_NEAR(distance / seen, 1.0, 1e-4);
  }
}

TEST(QueryMetric, KeepsTheDirectionsThatQueriesSee) {
  // Keys vary three times more where no query looks.
  const int d = 32, rank = 8;
  std::vector<float> keys = normal_rows(2000, d, 5), queries = normal_rows(256, d, 6);
  for (int n = 0; n < 2000; ++n) {
    for (int i = rank; i < d; ++i) keys[n * d + i] *= 3.0f;
  }
  for (int j = 0; j < 256; ++j) {
    for (int i = rank; i < d; ++i) queries[j * d + i] = 0.0f;
  }
  QueryMoments moments;
  moments.observe(queries.data(), 256, d);
  EXPECT_LT(logit_error(QueryMetric::fit(keys.data(), 2000, d, moments, rank), keys, queries),
            1e-3);
  EXPECT_GT(logit_error(QueryMetric::fit(keys.data(), 2000, d, {}, rank), keys, queries), 0.3);
}

TEST(QueryMetric, StaysFiniteForDegenerateInput) {
  const int d = 8;
  const std::vector<float> equal(10 * d, 3.0f), zeros(10 * d, 0.0f);
  QueryMoments moments;
  moments.observe(zeros.data(), 10, d);
  for (const std::vector<float>& keys : {equal, zeros}) {
    const QueryMetric metric = QueryMetric::fit(keys.data(), 10, d, moments, d);
    std::vector<float> y(10 * d);
    metric.coordinates(keys.data(), 10, y.data());
    for (float x : y) EXPECT_NEAR(x, 0.0f, 1e-5f);
    for (float x : metric.from_query) EXPECT_TRUE(std::isfinite(x));
  }
}

TEST(QueryMetric, SeesNumbersOfAnySizeAsItSeesOrdinaryOnes) {
  const int d = 24;
  const std::vector<float> keys = normal_rows(500, d, 1), queries = normal_rows(64, d, 2);
  for (const int exponent : {-140, -100, -50, 50, 100, 124}) {
    std::vector<float> far_keys = keys, far_queries = queries;
    for (float& x : far_keys) x = std::ldexp(x, exponent);
    for (float& x : far_queries) x = std::ldexp(x, -std::max(exponent, -120));
    QueryMoments moments;
    moments.observe(far_queries.data(), 64, d);
    const QueryMetric metric = QueryMetric::fit(far_keys.data(), 500, d, moments, d);
    // Below 2^-126 floats have fewer digits.
    EXPECT_LT(logit_error(metric, far_keys, far_queries), exponent < -120 ? 1e-3 : 1e-8)
        << exponent;
  }
}

TEST(QueryMetric, PlacesKeysFarFromAllItWasFittedToAtTheEdge) {
  const int d = 16;
  const std::vector<float> keys = normal_rows(100, d, 1);
  const QueryMetric metric = QueryMetric::fit(keys.data(), 100, d, {}, d);
  std::vector<float> far(3 * d), y(3 * d);
  for (int i = 0; i < d; ++i) {
    far[i] = 3e38f;
    far[d + i] = i % 2 == 0 ? 3e38f : -3e38f;
    far[2 * d + i] = keys[i];
  }
  metric.coordinates(far.data(), 3, y.data());
  for (int i = 0; i < 2 * d; ++i) EXPECT_LE(std::abs(y[i]), 0x1p50f);
  EXPECT_GT(*std::max_element(y.begin(), y.begin() + d), 0x1p49f);
  for (int i = 2 * d; i < 3 * d; ++i) EXPECT_LT(std::abs(y[i]), 100.0f);
}

TEST(QueryMoments, TakeAnyFiniteRowAndLeaveOutOthers) {
  const int d = 8;
  std::vector<float> rows = normal_rows(600, d, 5);
  const float sizes[] = {1.0f, 3e38f, 1e-40f, 1e19f, 1e25f};
  for (std::size_t i = 0; i < rows.size(); ++i) {
    rows[i] = std::clamp(rows[i], -1.0f, 1.0f) * sizes[i / d % 5];
  }
  rows[550 * d + 3] = std::nanf("");
  rows[551 * d + 2] = INFINITY;
  QueryMoments moments;
  moments.observe(rows.data(), 600, d);
  std::vector<double> expected(d * d, 0.0);
  // Of the rows behind the first block few count twice: not yet as half.
  int more = 0;
  for (int r = 512; r < 600; ++r) more += r % QueryMoments::kEvery == 0;
  const double of_all = 0.5 * more / 64;
  for (int r = 0; r < 600; ++r) {
    if (r == 550 || r == 551) continue;
    const bool twice = r >= 512 && r % QueryMoments::kEvery == 0;
    const double weight = (1.0 - of_all) / 600 + (twice ? of_all / more : 0.0);
    for (int i = 0; i < d * d; ++i)
      expected[i] += weight * double{rows[r * d + i / d]} * rows[r * d + i % d];
  }
  const std::vector<double> second = moments.second();
  for (int i = 0; i < d * d; ++i)
    EXPECT_NEAR(second[i], expected[i], 1e-5 * expected[i / d * (d + 1)]);
}

TEST(QueryMoments, CopiesShareWhatTheyHoldUntilOneOfThemObserves) {
  const int d = 64;
  const std::vector<float> rows = normal_rows(1200, d, 6);
  QueryMoments first;
  first.observe(rows.data(), 700, d);
  const std::size_t alone = first.memory_bytes();
  QueryMoments second = first;
  EXPECT_EQ(first.memory_bytes(), alone / 2);
  EXPECT_EQ(second.memory_bytes(), alone / 2);
  const std::vector<double> before = first.second();
  second.observe(rows.data() + 700 * d, 500, d);
  EXPECT_EQ(first.second(), before);
  EXPECT_EQ(first.memory_bytes(), alone);
  QueryMoments whole;
  whole.observe(rows.data(), 1200, d);
  EXPECT_EQ(second.second(), whole.second());
  first.observe(rows.data() + 700 * d, 500, d);
  EXPECT_EQ(first.second(), whole.second());
}

// At most the upper triangles of three sums, and what few rows take themselves.
TEST(QueryMoments, TakeNoMoreThanTheirRowsOrThreeTriangles) {
  const int d = 128;
  const std::vector<float> rows = normal_rows(1500, d, 7);
  const std::size_t triangle = d * (d + 1) / 2 * sizeof(float);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    QueryMoments moments(dtype);
    for (int n = 0; n < 1500; n += 4) {
      moments.observe(rows.data() + n * d, 4, d);
      const std::size_t of_rows = (n + 4 + 16) * d * size_of(dtype);
      EXPECT_LE(moments.memory_bytes(), 256 + std::min(of_rows, 3 * triangle + 16 * d * 4));
    }
  }
}

// The same rows in calls of any length, also where those that do not count are left out.
TEST(QueryMoments, DoNotDependOnHowRowsCome) {
  const int d = 8;
  const std::int64_t total = 4 * QueryMoments::kBlock + 100;
  const std::vector<float> rows = normal_rows(static_cast<int>(total), d, 7);
  QueryMoments whole;
  whole.observe(rows.data(), total, d);
  for (const std::int64_t chunk : {1, 7, 511, 512, 513, 1500, 2148}) {
    QueryMoments chunked, skipping;
    for (std::int64_t at = 0; at < total; at += chunk) {
      const std::int64_t n = std::min(chunk, total - at);
      std::vector<float> counting;
      for (const std::int64_t row : skipping.counting(n)) {
        const float* from = rows.data() + (at + row) * d;
        counting.insert(counting.end(), from, from + d);
      }
      chunked.observe(rows.data() + at * d, n, d);
      skipping.observe_counting(counting.data(), n, d);
    }
    EXPECT_EQ(chunked.second(), whole.second()) << chunk;
    EXPECT_EQ(skipping.second(), whole.second()) << chunk;
  }
}

TEST(QueryMoments, WeighTheLastBlockAndTheRestAsMuchAsAll) {
  const int d = 8, block = static_cast<int>(QueryMoments::kBlock), n = block * 4 + 40;
  const std::vector<float> rows = normal_rows(n, d, 9);
  QueryMoments moments;
  EXPECT_TRUE(moments.empty());
  EXPECT_TRUE(moments.second().empty());
  moments.observe(rows.data(), n, d);
  EXPECT_FALSE(moments.empty());
  for (int i = 0; i < d; ++i) {
    for (int j = 0; j < d; ++j) {
      double recent = 0.0, all = 0.0;
      int count = 0;
      for (int r = 0; r < n; ++r) {
        const double x = static_cast<double>(rows[r * d + i]) * rows[r * d + j];
        if (r >= n - block - 40) recent += x / (block + 40);
        if (r < block || r % QueryMoments::kEvery != 0) continue;
        all += x;
        ++count;
      }
      EXPECT_NEAR(moments.second()[i * d + j], 0.5 * recent + 0.5 * all / count, 1e-5);
    }
  }
}

}  // namespace
}  // namespace icecache::query_metric_test
