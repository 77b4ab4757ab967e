/* The engine's machine code for CPUs: `kernels.py` compiles this file and calls the functions of
 * the headers that are not static. */
#include "forward.h"
