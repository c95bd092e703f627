# cmake --install BUILD --prefix PREFIX: the library, its headers, and find_package(icecache).
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)
set(folder ${CMAKE_INSTALL_LIBDIR}/cmake/icecache)
install(TARGETS icecache EXPORT icecache LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/icecache DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT icecache FILE icecacheConfig.cmake NAMESPACE icecache:: DESTINATION ${folder})
write_basic_package_version_file(icecacheConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/icecacheConfigVersion.cmake DESTINATION ${folder})
