/*
 * SPDX-License-Identifier: Apache-2.0
 *
 * vhost_blk: a client of vhost-user-blk, one request at a time in each of several lanes.
 *
 * The protocol shares memory: a request's data are put into memory that the server has mapped too, and only «there is
 * something» goes through the kernel. A lane is a virtqueue with room for one request and its data.
 *
 * https://qemu-project.gitlab.io/qemu/interop/vhost-user.html and the virtio specification, 2.7 (split virtqueues) and
 * 5.2 (block device).
 */
#ifndef VHOST_BLK_H
#define VHOST_BLK_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/un.h>

#define VHOST_SECTOR 512U          /* offsets and lengths are multiples of it */
#define VHOST_DATA (1U << 20)      /* a request's data at most */
#define VHOST_ZEROES (16U << 20)   /* what QEMU takes at once */

enum vhost_request { VHOST_READ = 0, VHOST_WRITE = 1, VHOST_FLUSH = 4, VHOST_WRITE_ZEROES = 13 };

struct vhost_lane;

struct vhost_server {
    uint64_t size;
    bool read_only, flushes, writes_zeroes;
    int socket;      /* stays the session's */
    unsigned lanes;  /* how many it takes, at most as many as asked for */
};

/* Connect and set up: 0 or an errno. Every lane is to be closed; the session ends with its last one. */
int vhost_connect(const struct sockaddr_un *address, unsigned lanes, int seconds, struct vhost_lane **first,
                  struct vhost_server *server);

/* A lane by its number, from the first. */
struct vhost_lane *vhost_lane(struct vhost_lane *first, unsigned number);

/* One request and its reply: 0 or an errno, -1 when the session is of no more use. */
int vhost_exchange(struct vhost_lane *lane, enum vhost_request request, void *data, uint32_t length, uint64_t offset);

/* Whether the server has not hung up yet. */
bool vhost_lives(const struct vhost_lane *lane);

/* Not from several threads at once for one session. */
void vhost_close(struct vhost_lane *lane);

#endif
