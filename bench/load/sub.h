/* Readers: what each is given is counted, and its order checked. */
#ifndef CLEVRD_BENCH_SUB_H
#define CLEVRD_BENCH_SUB_H

#include "run.h"

void subs_open(struct run *run);
void sub_connected(struct run *run, struct sub *sub);
void sub_readable(struct run *run, struct sub *sub);
void slow_subs_read(struct run *run);

#endif
