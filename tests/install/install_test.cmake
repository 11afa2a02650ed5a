# Installs a build, moves the installation, and has another project find it, build and run.
#   cmake -DBUILD=... -DWORK=... -DEXAMPLES=... -P install_test.cmake
file(REMOVE_RECURSE ${WORK})
set(prefix ${WORK}/moved)
set(project ${CMAKE_CURRENT_LIST_DIR})
execute_process(COMMAND ${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/installed
  OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
file(RENAME ${WORK}/installed ${prefix})
execute_process(
  COMMAND ${CMAKE_COMMAND} -S ${project} -B ${WORK}/build -DCMAKE_PREFIX_PATH=${prefix}
          -DEXAMPLES=${EXAMPLES}
  COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${CMAKE_COMMAND} --build ${WORK}/build COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${CMAKE_CTEST_COMMAND} --test-dir ${WORK}/build --output-on-failure
  COMMAND_ERROR_IS_FATAL ANY)
