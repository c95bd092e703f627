// Fields by name: the table of all parameters, and their values as text.
#include "icecache/config.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "config/config_values.h"
#include "icecache/error.h"

namespace icecache {
namespace {

// The text of a literal as written in ICECACHE_CONFIG, without the quotes of a string.
constexpr std::string_view unquoted(std::string_view literal) {
  if (literal.size() >= 2 && literal.front() == '"') {
    literal.remove_prefix(1);
    literal.remove_suffix(1);
  }
  return literal;
}

constexpr ConfigField kFields[] = {
#define ICECACHE_FIELD(type, name, default_value, unit, meaning) \
  ConfigField{#name, #type, unquoted(#default_value), unit, meaning},
    ICECACHE_CONFIG(ICECACHE_FIELD)
#undef ICECACHE_FIELD
};

std::string lower(std::string_view text) {
  std::string result(text);
  for (char& c : result) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return result;
}

std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i + 1;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] != b[j]);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

const ConfigField& field_of(std::string_view name) {
  const ConfigField* nearest = &kFields[0];
  std::size_t least = std::numeric_limits<std::size_t>::max();
  for (const ConfigField& field : kFields) {
    const std::size_t distance = edit_distance(name, field.name);
    if (distance == 0) return field;
    if (distance < least) {
      least = distance;
      nearest = &field;
    }
  }
  throw InvalidArgument(
      message("there is no parameter \"", name, "\"; the nearest name is \"", nearest->name, "\""));
}

[[noreturn]] void refuse(const ConfigField& field, std::string_view expected,
                         std::string_view value) {
  throw InvalidArgument(message(field.name, " must be ", expected, ", got \"", value, "\""));
}

template <typename Number>
bool parse_number(std::string_view text, Number& number) {
  const char* end = text.data() + text.size();
  const auto result = std::from_chars(text.data(), end, number);
  return result.ec == std::errc{} && result.ptr == end;
}

// "8G", "512 MiB", "1.5g": powers of 1024. False where the text is not of this form or too large.
bool parse_bytes(std::string_view text, std::int64_t& bytes) {
  std::string form = lower(text);
  std::erase(form, ' ');
  for (const std::string_view suffix : {"ib", "b"}) {
    if (form.ends_with(suffix)) {
      form.resize(form.size() - suffix.size());
      break;
    }
  }
  constexpr std::string_view kUnits = "kmgt";
  const std::size_t unit = form.empty() ? std::string_view::npos : kUnits.find(form.back());
  if (unit == std::string_view::npos) return parse_number(form, bytes);
  form.pop_back();
  double count = 0.0;
  if (!parse_number(form, count) || !std::isfinite(count)) return false;
  const double value = std::ldexp(count, 10 * static_cast<int>(unit + 1));
  if (std::abs(value) >= 0x1p63) return false;
  bytes = static_cast<std::int64_t>(value);
  return true;
}

void parse(const ConfigField& field, std::string_view value, std::int64_t& out) {
  std::int64_t number = 0;
  const bool derivable = config_values::is_derivable(field.name);
  if (derivable && lower(value) == "auto") {
    out = 0;
    return;
  }
  const bool bytes = field.unit == "bytes";
  if (!(bytes ? parse_bytes(value, number) : parse_number(value, number))) {
    std::string expected =
        bytes ? "a number of bytes such as 1073741824, 512M or 8G" : "a whole number";
    if (derivable) expected += ", or auto";
    refuse(field, expected, value);
  }
  out = number;
}

void parse(const ConfigField& field, std::string_view value, double& out) {
  double number = 0.0;
  if (!parse_number(value, number) || !std::isfinite(number)) refuse(field, "a number", value);
  out = number;
}

void parse(const ConfigField& field, std::string_view value, std::string& out) {
  if (!config_values::is_choice(field.name, value)) {
    refuse(field, config_values::choices_text(field.name), value);
  }
  out = value;
}

void parse(const ConfigField& field, std::string_view value, bool& out) {
  const std::string word = lower(value);
  if (word == "true" || word == "on" || word == "yes" || word == "1") {
    out = true;
  } else if (word == "false" || word == "off" || word == "no" || word == "0") {
    out = false;
  } else {
    refuse(field, "true or false", value);
  }
}

std::string text_of(std::int64_t value) {
  return std::to_string(value);
}
std::string text_of(bool value) {
  return value ? "true" : "false";
}
std::string text_of(const std::string& value) {
  return value;
}
std::string text_of(double value) {
  std::array<char, 32> buffer;
  const auto result = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value);
  std::string text(buffer.data(), result.ptr);
  // A real keeps its decimal point, so that the text tells its type.
  if (text.find_first_not_of("-0123456789") == std::string::npos) text += ".0";
  return text;
}

}  // namespace

std::span<const ConfigField> config_fields() {
  return kFields;
}

void Config::set(std::string_view field_name, std::string_view value) {
  const ConfigField& field = field_of(field_name);
  const std::string_view known = field.name;
#define ICECACHE_SET(type, name, default_value, unit, meaning) \
  if (known == #name) parse(field, value, this->name);
  ICECACHE_CONFIG(ICECACHE_SET)
#undef ICECACHE_SET
}

std::string Config::get(std::string_view field_name) const {
  const std::string_view known = field_of(field_name).name;
  std::string text;
#define ICECACHE_GET(type, name, default_value, unit, meaning) \
  if (known == #name) text = text_of(this->name);
  ICECACHE_CONFIG(ICECACHE_GET)
#undef ICECACHE_GET
  return text;
}

}  // namespace icecache
