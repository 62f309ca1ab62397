/* One turn of the loop: each event goes to the role of its connection. */
#ifndef CLEVRD_BENCH_TURN_H
#define CLEVRD_BENCH_TURN_H

#include "run.h"

/* Wait for events until wake_ns at the latest, and handle them. */
void turn_take(struct run *run, uint64_t wake_ns);

#endif
