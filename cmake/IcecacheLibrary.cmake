# libicecache.so: everything below the bindings.
find_package(Threads REQUIRED)

foreach(layer config threads pages index compared host simd cpu)
  list(APPEND layers csrc/${layer}/*.cpp)
endforeach()
file(GLOB icecache_sources CONFIGURE_DEPENDS ${layers})
list(FILTER icecache_sources EXCLUDE REGEX "/(no_)?faiss[a-z_]*\\.cpp$")

add_library(icecache SHARED ${icecache_sources})
target_include_directories(
  icecache PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:include>
                  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/csrc>)
target_compile_features(icecache PUBLIC cxx_std_20)
# Seen by this source alone: builds that differ in them share all other objects.
set(build_info csrc/host/build_info.cpp)
set_property(SOURCE ${build_info} APPEND PROPERTY COMPILE_DEFINITIONS
                                                  ICECACHE_VERSION="${PROJECT_VERSION}")
target_compile_options(icecache PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-fno-semantic-interposition>)
target_link_libraries(icecache PRIVATE icecache_flags Threads::Threads)
# Static libraries stay private: FAISS in another extension of the process must not meet ours.
target_link_options(icecache PRIVATE -Wl,--exclude-libs,ALL)
if(NOT ICECACHE_SANITIZE)  # the symbols of a sanitizer come from the program that loads the library
  target_link_options(icecache PRIVATE -Wl,-z,defs)
endif()
icecache_package_library(icecache)

# One ISA level per source file, told by its name; the choice between them is made at run time by
# csrc/simd/dispatch.cpp, which asks the CPU for exactly these extensions.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  # Scheduled for the CPUs that have no more than AVX2 today; GCC's generic order costs the scan 20 %.
  set(avx2_flags -mavx2 -mfma -mf16c -mtune=znver3)
  set(avx512_flags -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq)
  set(avx512vnni_flags -mavx512vnni)  # beside those of avx512, which its name contains
  foreach(level avx2 avx512 avx512vnni)
    set(sources ${icecache_sources})
    list(FILTER sources INCLUDE REGEX "/csrc/simd/[^/]*${level}[^/]*$")
    set_property(SOURCE ${sources} APPEND PROPERTY COMPILE_OPTIONS ${${level}_flags})
    # The levels share their sources: arithmetic that is undefined is so at the baseline, too, where it
    # is looked for.
    if(ICECACHE_SANITIZE MATCHES "address")
      set_property(SOURCE ${sources} APPEND PROPERTY COMPILE_OPTIONS -fno-sanitize=undefined
                                                     ${icecache_checked_by_calls})
    endif()
  endforeach()
endif()

# CUDA: the real device layer, or stubs with the same symbols that say what is missing. Wheels get
# every architecture; a build for development this machine's, or the two that differ most.
file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/device/*.cpp)
list(FILTER cuda_sources EXCLUDE REGEX "/no_device_cache\\.cpp$")
set(icecache_with_cuda OFF)
if(NOT ICECACHE_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
    if(DEFINED SKBUILD AND NOT SKBUILD_STATE STREQUAL "editable")
      # 8.6 and 8.9 run the code of 8.0; the last one brings PTX for what is to come.
      set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 90-real 100-real 120)
    endif()
  endif()
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
      message(STATUS "CUDA left out: nvcc 12.8 or newer is needed, found "
                     "${CMAKE_CUDA_COMPILER_VERSION}")
    else()
      set(icecache_with_cuda ON)
    endif()
  endif()
endif()
if(ICECACHE_CUDA STREQUAL "ON" AND NOT icecache_with_cuda)
  message(FATAL_ERROR "ICECACHE_CUDA=ON needs nvcc 12.8 or newer on PATH or in CUDACXX")
endif()
if(icecache_with_cuda)
  # CMake 3.25 knows no C++20 for nvcc: the flag is given by hand.
  set(cuda_options -std=c++20 --expt-relaxed-constexpr --threads=0 -Xcompiler=-Wall,-Wextra)
  if(ICECACHE_WERROR)
    # A register that is spilled in a decode kernel costs more than it looks: that is an error, too.
    list(APPEND cuda_options -Werror=all-warnings -Xptxas=--warn-on-spills,--warning-as-error)
  endif()
  target_compile_options(icecache PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${cuda_options}>")
  set_target_properties(icecache PROPERTIES CUDA_STANDARD_REQUIRED OFF CUDA_RUNTIME_LIBRARY Static
                                            CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
  target_sources(icecache PRIVATE ${cuda_sources})
  target_link_libraries(icecache PRIVATE CUDA::cudart_static)
else()
  target_sources(icecache PRIVATE csrc/cuda/no_cuda.cpp csrc/device/no_device_cache.cpp)
endif()

# FAISS: Debian's library is static, and refers to targets of OpenMP that must exist before.
set(icecache_with_faiss OFF)
if(NOT ICECACHE_FAISS STREQUAL "OFF")
  find_package(OpenMP COMPONENTS CXX QUIET)
  if(OpenMP_CXX_FOUND)
    find_package(faiss QUIET)
  endif()
  if(TARGET faiss)
    set(icecache_with_faiss ON)
    get_target_property(faiss_links faiss INTERFACE_LINK_LIBRARIES)
    foreach(library IN LISTS faiss_links)
      if(IS_ABSOLUTE "${library}" AND NOT EXISTS "${library}")
        message(STATUS "FAISS left out: it links ${library}, which is missing (libopenblas-dev)")
        set(icecache_with_faiss OFF)
      endif()
    endforeach()
  endif()
endif()
if(ICECACHE_FAISS STREQUAL "ON" AND NOT icecache_with_faiss)
  message(FATAL_ERROR "ICECACHE_FAISS=ON needs OpenMP, FAISS and OpenBLAS: "
                      "apt-get install libfaiss-dev libopenblas-dev")
endif()
if(icecache_with_faiss)
  file(GLOB faiss_sources CONFIGURE_DEPENDS csrc/compared/faiss_*.cpp)
  target_sources(icecache PRIVATE ${faiss_sources})
  target_link_libraries(icecache PRIVATE faiss)
  set_property(SOURCE ${build_info} APPEND PROPERTY COMPILE_DEFINITIONS ICECACHE_HAVE_FAISS)
else()
  target_sources(icecache PRIVATE csrc/compared/no_faiss.cpp)
endif()

if(ICECACHE_SANITIZE)
  icecache_compile_together(icecache)
  # Tests of faults stand between these and their callers (tests/cpp/fault/injector.cpp), which a compiler
  # that sees both would not let them.
  set_property(SOURCE csrc/host/head_update.cpp csrc/pages/page_pool.cpp csrc/host/segment_build.cpp
                      csrc/index/growing_index.cpp PROPERTY SKIP_UNITY_BUILD_INCLUSION ON)
  # It defines macros for the headers it includes, and has flags of its own, which leave to the address
  # sanitizer what that finds, too.
  set_property(SOURCE csrc/simd/kernels_scalar.cpp APPEND
               PROPERTY COMPILE_OPTIONS -fno-sanitize=null,object-size ${icecache_checked_by_calls})
endif()

message(STATUS "icecache ${PROJECT_VERSION}: CUDA ${icecache_with_cuda}, FAISS ${icecache_with_faiss}")
