# The Python extensions, for the interpreter in Python_EXECUTABLE (default: python3 on PATH).
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)

# Where a Python package lies, without importing it (torch takes seconds); empty where it is absent.
function(icecache_find_package_folder name result)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "import importlib.util as u; s = u.find_spec('${name}')
print(s.submodule_search_locations[0] if s and s.submodule_search_locations else '')"
    OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  set(${result} "${folder}" PARENT_SCOPE)
endfunction()

# Loads an extension as soon as it is built, with every symbol bound: one that nobody defines fails the
# build, and not the import on another machine. The linker cannot tell (-z defs), because Python's and
# torch's own symbols are defined by the process that loads an extension.
function(icecache_check_loads target prelude)
  add_custom_command(
    TARGET ${target} POST_BUILD
    COMMAND "${Python_EXECUTABLE}" -c
            "${prelude}import ctypes$<SEMICOLON> ctypes.CDLL('$<TARGET_FILE:${target}>')" VERBATIM)
endfunction()

# _core: stateful classes; sees no torch.
icecache_find_package_folder(pybind11 pybind11_folder)
if(pybind11_folder)
  list(APPEND CMAKE_PREFIX_PATH "${pybind11_folder}/share/cmake/pybind11")
endif()
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 2.13 CONFIG)
if(NOT pybind11_FOUND)
  message(FATAL_ERROR "pybind11 is missing: ${Python_EXECUTABLE} -m pip install pybind11")
endif()
file(GLOB core_sources CONFIGURE_DEPENDS csrc/bindings/core_*.cpp)
pybind11_add_module(_core MODULE NO_EXTRAS ${core_sources})
target_link_libraries(_core PRIVATE icecache icecache_flags)
# Calls are handed on: -O3 takes pybind11's templates a third longer, and gains nothing.
target_compile_options(_core PRIVATE -O1)
if(ICECACHE_UNITY)
  # pybind11's headers take most of the time of each source: two are compiled instead of all.
  set_target_properties(_core PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP)
  set_property(SOURCE ${core_sources} PROPERTY UNITY_GROUP engine)
  list(FILTER core_sources INCLUDE REGEX "core_(device_cache|errors|arguments|tensors)")
  set_property(SOURCE ${core_sources} PROPERTY UNITY_GROUP device)
endif()
icecache_package_library(_core)
icecache_check_loads(_core "")

# _ops: torch operators through the stable ABI, so that one binary serves torch >= 2.11. It needs no
# Python.h; torch.ops.load_library loads it.
icecache_find_package_folder(torch torch_folder)
if(NOT torch_folder)
  message(
    FATAL_ERROR
      "torch >= 2.11 is not installed for ${Python_EXECUTABLE}; _ops cannot be built without it. "
      "pip hides the installed torch from builds unless told otherwise: "
      "pip install --no-build-isolation --no-deps .")
endif()
file(STRINGS "${torch_folder}/version.py" torch_version REGEX "^__version__ *=")
string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" torch_version "${torch_version}")
if(torch_version VERSION_LESS 2.11)
  message(FATAL_ERROR "torch >= 2.11 is needed, found '${torch_version}' in ${torch_folder}")
endif()
file(GLOB ops_sources CONFIGURE_DEPENDS csrc/bindings/ops_*.cpp)
add_library(_ops MODULE ${ops_sources})
set_target_properties(_ops PROPERTIES PREFIX "" CXX_VISIBILITY_PRESET hidden)
target_include_directories(_ops SYSTEM PRIVATE "${torch_folder}/include")
target_compile_definitions(_ops PRIVATE TORCH_TARGET_VERSION=0x020b000000000000)
target_link_libraries(_ops PRIVATE icecache icecache_flags)
# Kept in DT_NEEDED though no symbol of libtorch.so itself is used: it leads to the libraries that
# define the ABI's functions, on CPU and CUDA builds of torch alike.
target_link_options(_ops PRIVATE -Wl,--no-as-needed "${torch_folder}/lib/libtorch.so"
                    -Wl,--as-needed)
icecache_package_library(_ops)
icecache_check_loads(_ops "import torch$<SEMICOLON> ")
