# icecache_flags: what every source of ours is compiled with, and nobody else's.
add_library(icecache_flags INTERFACE)
target_compile_options(
  icecache_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall> $<$<COMPILE_LANGUAGE:CXX>:-Wextra>
                           $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${ICECACHE_WERROR}>>:-Werror>)

if(ICECACHE_SANITIZE)
  if(NOT ICECACHE_SANITIZE MATCHES "^(address|undefined|thread)(,(address|undefined))?$")
    message(FATAL_ERROR "ICECACHE_SANITIZE must be address, undefined, address,undefined or thread, "
                        "got '${ICECACHE_SANITIZE}'")
  endif()
  set(sanitize -fsanitize=${ICECACHE_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_compile_options(icecache_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:${sanitize}>)
  target_link_options(icecache_flags INTERFACE -fsanitize=${ICECACHE_SANITIZE})
endif()

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
