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
  if(ICECACHE_SANITIZE MATCHES "address")
    # Accesses are checked by calls, which compile faster; for what runs little.
    set(icecache_checked_by_calls --param=asan-instrumentation-with-call-threshold=0)
  endif()
  set(sanitize -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_compile_options(
    icecache_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${ICECACHE_SANITIZE};${sanitize}>)
  set(sanitize_memory -fsanitize=${memory_sanitizer} ${sanitize} ${icecache_checked_by_calls})
  target_compile_options(icecache_test_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:${sanitize_memory}>)
  foreach(flags icecache_flags icecache_test_flags)
    target_link_options(${flags} INTERFACE -fsanitize=${ICECACHE_SANITIZE})
  endforeach()
endif()

# Compiles the sources of `target` several at a time, which takes half the time. Only for builds that are
# checks: in one without, a source that lacks an #include must not compile. Sources with flags of their
# own are compiled alone.
function(icecache_compile_together target)
  set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 12)
endfunction()

# Puts the Python package's libraries where PYTHONPATH=python finds them. They find each other through
# their own folder, in the source tree as in an installed wheel.
function(icecache_package_library target)
  set_target_properties(${target} PROPERTIES BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN")
  if(ICECACHE_INPLACE)
    set_target_properties(${target} PROPERTIES LIBRARY_OUTPUT_DIRECTORY
                                               "${PROJECT_SOURCE_DIR}/python/icecache")
  endif()
  if(DEFINED SKBUILD)
    install(TARGETS ${target} LIBRARY DESTINATION icecache)
  endif()
endfunction()
