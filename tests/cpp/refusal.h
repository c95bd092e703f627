// What a refused call says.
#pragma once

#include <gtest/gtest.h>

#include <string>

namespace icecache::testing {

// The message of the Exception that `call` throws, "" where it throws none.
template <typename Exception, typename Call>
std::string refusal(const Call& call) {
  try {
    call();
  } catch (const Exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace icecache::testing

#define EXPECT_MENTIONS(text, part) \
  EXPECT_NE(std::string(text).find(part), std::string::npos) << "message: \"" << (text) << '"'
