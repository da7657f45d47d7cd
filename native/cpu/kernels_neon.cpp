// The kernels for one instruction set; the build gives this file its flags (CMakeLists.txt). No std:: here: a template
// instantiated with these flags could be linked into code that runs on a lesser processor.
#define A8_VARIANT neon
#include "kernels.inc"
