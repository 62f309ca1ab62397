/* The report: one line of JSON for the whole run. */
#ifndef CLEVRD_BENCH_REPORT_H
#define CLEVRD_BENCH_REPORT_H

#include "run.h"

void report_print(const struct run *run);

#endif
