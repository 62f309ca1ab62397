/* Publishers: what is due is composed and sent, and its answers are counted. */
#ifndef CLEVRD_BENCH_PUB_H
#define CLEVRD_BENCH_PUB_H

#include "run.h"

void pubs_open(struct run *run);
void pub_connected(struct run *run, struct pub *pub);
void pub_readable(struct run *run, struct pub *pub);
void pub_writable(struct run *run, struct pub *pub);
/* Compose and send everything that is due. True when it stopped for want of a free connection. */
bool pubs_send_due(struct run *run, uint64_t now);
uint64_t pubs_next_due_ns(const struct run *run);
bool pubs_are_done(const struct run *run);
bool pubs_have_all_answers(const struct run *run);

#endif
