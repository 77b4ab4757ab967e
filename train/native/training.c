/* Machine code for training on CPUs: `native_code.py` compiles this file and calls the functions of the
 * headers that are not static.
 */
#include "head.h"
#include "layer.h"

/* Whether there is a matrix unit that this process may use. */
int has_unit(void) {
#if HAS_MATRIX_UNIT
    return has_matrix_unit();
#else
    return 0;
#endif
}
