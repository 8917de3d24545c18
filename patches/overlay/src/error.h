// The sentence that kvl_last_error() returns, one per thread.

#pragma once

#include "kvl.h"

#include <string>

void kvl_set_error(const std::string & what);
// sets the error and returns the status
int32_t kvl_fail(kvl_status status, const std::string & what);
