# icecache_flags: what every source of ours is compiled with, and nobody else's; icecache_test_flags: the
# same for tests, which only the address and the thread sanitizer watch, for it is the library's
# arithmetic that is tested, and the undefined-behaviour sanitizer doubles the time of a build.
add_library(icecache_warnings INTERFACE)
add_library(icecache_flags INTERFACE)
add_library(icecache_test_flags INTERFACE)
target_link_libraries(icecache_flags INTERFACE icecache_warnings)
target_link_libraries(icecache_test_flags INTERFACE icecache_warnings)
target_compile_options(
  icecache_warnings INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall> $<$<COMPILE_LANGUAGE:CXX>:-Wextra>
                              $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${ICECACHE_WERROR}>>:-Werror>)

if(ICECACHE_SANITIZE)
  if(NOT ICECACHE_SANITIZE MATCHES "^(address|undefined|thread)(,(address|undefined))?$")
    message(FATAL_ERROR "ICECACHE_SANITIZE must be address, undefined, address,undefined or thread, "
                        "got '${ICECACHE_SANITIZE}'")
  endif()
  string(REPLACE ",undefined" "" memory_sanitizer "${ICECACHE_SANITIZE}")
  set(sanitize -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_compile_options(
    icecache_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${ICECACHE_SANITIZE};${sanitize}>)
  target_compile_options(
    icecache_test_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${memory_sanitizer};${sanitize}>)
  foreach(flags icecache_flags icecache_test_flags)
    target_link_options(${flags} INTERFACE -fsanitize=${ICECACHE_SANITIZE})
  endforeach()
endif()

# Headers that cost most of the time of small sources, compiled once for `target`. Only for builds that
# are checks: in one without, a source that lacks an #include must not compile. Sources with flags of
# their own are left out. (-fpch-preprocess: for ccache.)
function(icecache_precompile target)
  target_precompile_headers(
    ${target} PRIVATE <algorithm> <array> <atomic> <cmath> <condition_variable> <cstdint> <functional>
    <memory> <mutex> <numeric> <optional> <span> <stdexcept> <string> <string_view> <thread>
    <unordered_map> <utility> <vector>)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-fpch-preprocess>)
  get_target_property(sources ${target} SOURCES)
  foreach(source IN LISTS sources)
    get_source_file_property(options "${source}" COMPILE_OPTIONS)
    if(options)
      set_property(SOURCE "${source}" PROPERTY SKIP_PRECOMPILE_HEADERS ON)
    endif()
  endforeach()
endfunction()

# Puts the Python package's libraries where PYTHONPATH=python finds them. They find each other through
# their own folder, in the source tree as in an installed wheel.
function(icecache_package_library target)
  set_target_properties(${target} PROPERTIES BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN")
  if(ICECACHE_INPLACE)
    set_target_properties(${target} PROPERTIES LIBRARY_OUTPUT_DIRECTORY
                                               "${PROJECT_SOURCE_DIR}/python/icecache")
  endif()
  install(TARGETS ${target} LIBRARY DESTINATION icecache)
endfunction()
