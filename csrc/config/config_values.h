// What a parameter may be, beyond its type: words of a closed set, and which ones can be derived.
#pragma once

#include <span>
#include <string>
#include <string_view>

namespace icecache::config_values {

// The accepted words of a parameter; empty where any text is accepted.
std::span<const std::string_view> choices(std::string_view field);
bool is_choice(std::string_view field, std::string_view value);
// "tree, dci, positional or faiss"
std::string choices_text(std::string_view field);

// True where 0 stands for a value that the engine derives ("auto" in text).
bool is_derivable(std::string_view field);

}  // namespace icecache::config_values
