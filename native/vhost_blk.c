/*
 * SPDX-License-Identifier: Apache-2.0
 *
 * See vhost_blk.h.
 */
#define _GNU_SOURCE
#include "vhost_blk.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

/* ---- Messages on the socket ------------------------------------------------------------------------------------ */

enum {
    GET_FEATURES = 1, SET_FEATURES = 2, SET_OWNER = 3, SET_MEM_TABLE = 5, SET_VRING_NUM = 8, SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10, SET_VRING_KICK = 12, SET_VRING_CALL = 13, GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16, GET_QUEUE_NUM = 17, SET_VRING_ENABLE = 18, GET_CONFIG = 24,
    VERSION = 1, IS_REPLY = 1 << 2, NEED_REPLY = 1 << 3,
};
#define BIT(number) (1ULL << (number))
#define BLK_READ_ONLY BIT(5)
#define BLK_FLUSH BIT(9)
#define BLK_WRITE_ZEROES BIT(14)
#define PROTOCOL_FEATURES BIT(30)
#define VIRTIO_1 BIT(32)
#define PROTOCOL_MQ BIT(0)
#define PROTOCOL_REPLY_ACK BIT(3)
#define PROTOCOL_CONFIG BIT(9)

struct message {
    uint32_t request, flags, size;
    union {
        uint64_t number;
        struct { uint32_t index, value; } ring;
        struct { uint32_t index, flags; uint64_t descriptors, used, available, log; } addresses;
        struct { uint32_t regions, padding; uint64_t guest, size, user, offset; } memory;
        struct { uint32_t offset, size, flags; uint64_t capacity; } __attribute__((packed)) config;
    };
} __attribute__((packed));
#define HEAD offsetof(struct message, number)

/* ---- Shared memory --------------------------------------------------------------------------------------------- */

enum { DESCRIPTORS = 4, HAS_NEXT = 1, DEVICE_WRITES = 2 };

struct descriptor { uint64_t address; uint32_t length; uint16_t flags, next; };

/* One virtqueue and the small parts of its request, in a line of its own. */
struct ring {
    struct descriptor descriptors[DESCRIPTORS];
    struct { uint16_t flags, index, ring[DESCRIPTORS], event; } available;
    struct { uint16_t flags, index; struct { uint32_t id, length; } ring[DESCRIPTORS]; uint16_t event; } used;
    struct { uint32_t type, priority; uint64_t sector; } head;
    struct { uint64_t sector; uint32_t sectors, flags; } range;
    uint8_t status;
} __attribute__((aligned(256)));

#define BASE 0x100000ULL /* where the memory is in the addresses of the messages and rings; not at 0 */
#define PAGE 4096U

struct vhost_lane {
    struct vhost_session *session;
    struct ring *ring;
    char *data;
    int kick;      /* an eventfd */
    int called;    /* a pipe: its other end is the server's only, so that its end is seen as the end of file */
    uint16_t completed;
};

struct vhost_session {
    int socket;
    unsigned open;
    char *memory;
    size_t length;
    struct vhost_lane lanes[];
};

static uint64_t address_of(const struct vhost_session *session, const void *place)
{
    return htole64(BASE + (uint64_t)((const char *)place - session->memory));
}

/* ---- Setting up ------------------------------------------------------------------------------------------------ */

static int tell(int socket, struct message *message, uint32_t request, size_t size, int descriptor)
{
    union { char room[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control = {0};
    struct iovec part = {message, HEAD + size};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};

    message->request = request;
    message->flags |= VERSION;
    message->size = (uint32_t)size;
    if (descriptor >= 0) {
        header.msg_control = control.room;
        header.msg_controllen = sizeof control.room;
        struct cmsghdr *first = CMSG_FIRSTHDR(&header);
        *first = (struct cmsghdr){CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
        memcpy(CMSG_DATA(first), &descriptor, sizeof descriptor);
    }
    return sendmsg(socket, &header, MSG_NOSIGNAL) == (ssize_t)part.iov_len ? 0 : EIO;
}

static int ask(int socket, struct message *message, uint32_t request, size_t size)
{
    int error = tell(socket, message, request, size, -1);
    size_t got = 0;

    while (!error && got < HEAD + (got < HEAD ? 0 : message->size)) {
        const size_t end = got < HEAD ? HEAD : HEAD + message->size;
        ssize_t more = recv(socket, (char *)message + got, end - got, 0);
        if (more <= 0 && !(more < 0 && errno == EINTR))
            error = EIO;
        else if (more > 0)
            got += (size_t)more;
        if (got >= HEAD && message->size > sizeof *message - HEAD)
            error = EPROTO;
    }
    if (!error && (message->request != request || !(message->flags & IS_REPLY)))
        error = EPROTO;
    return error;
}

static int ask_number(int socket, uint32_t request, uint64_t *number)
{
    struct message message = {0};
    int error = ask(socket, &message, request, 0);
    if (!error && message.size != sizeof message.number)
        error = EPROTO;
    *number = message.number;
    return error;
}

static int tell_number(int socket, uint32_t request, uint64_t number, int descriptor)
{
    struct message message = {.number = number};
    return tell(socket, &message, request, sizeof message.number, descriptor);
}

static int tell_ring(int socket, uint32_t request, unsigned index, uint32_t value)
{
    struct message message = {.ring = {index, value}};
    return tell(socket, &message, request, sizeof message.ring, -1);
}

/* Agree on features, and learn what the server is. */
static int negotiate(int socket, struct vhost_server *server)
{
    const uint64_t needed = VIRTIO_1 | PROTOCOL_FEATURES;
    const uint64_t protocol_needed = PROTOCOL_MQ | PROTOCOL_REPLY_ACK | PROTOCOL_CONFIG;
    struct message config = {.config = {.size = sizeof config.config.capacity}};
    uint64_t features, protocol, queues;
    int error;

    if ((error = ask_number(socket, GET_FEATURES, &features)) != 0 ||
        (error = ask_number(socket, GET_PROTOCOL_FEATURES, &protocol)) != 0)
        return error;
    if ((features & needed) != needed || (protocol & protocol_needed) != protocol_needed)
        return EPROTO;
    features &= needed | BLK_READ_ONLY | BLK_FLUSH | BLK_WRITE_ZEROES;
    if ((error = tell_number(socket, SET_PROTOCOL_FEATURES, protocol_needed, -1)) != 0 ||
        (error = ask_number(socket, GET_QUEUE_NUM, &queues)) != 0 ||
        (error = tell_number(socket, SET_OWNER, 0, -1)) != 0 ||
        (error = tell_number(socket, SET_FEATURES, features, -1)) != 0 ||
        (error = ask(socket, &config, GET_CONFIG, sizeof config.config)) != 0)
        return error;
    if (config.size != sizeof config.config || queues == 0)
        return EPROTO;
    server->size = le64toh(config.config.capacity) * VHOST_SECTOR;
    server->read_only = features & BLK_READ_ONLY;
    server->flushes = features & BLK_FLUSH;
    server->writes_zeroes = features & BLK_WRITE_ZEROES;
    if (queues < server->lanes)
        server->lanes = (unsigned)queues;
    return 0;
}

static int share_memory(struct vhost_session *session)
{
    struct message message = {.memory = {.regions = 1, .guest = BASE, .size = session->length, .user = BASE}};
    int error, memory = memfd_create("vhost_blk", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    if (memory < 0)
        return errno;
    if (ftruncate(memory, (off_t)session->length) != 0 ||
        fcntl(memory, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0 ||
        (session->memory = mmap(NULL, session->length, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0)) == MAP_FAILED)
        error = errno;
    else
        error = tell(session->socket, &message, SET_MEM_TABLE, sizeof message.memory, memory);
    close(memory);
    return error;
}

static int open_lane(struct vhost_session *session, unsigned index)
{
    struct vhost_lane *lane = &session->lanes[index];
    struct ring *ring = lane->ring;
    struct message message = {.addresses = {.index = index}};
    int error, ends[2];

    if ((lane->kick = eventfd(0, EFD_CLOEXEC)) < 0 || pipe2(ends, O_CLOEXEC) != 0)
        return errno;
    lane->called = ends[0];
    message.addresses.descriptors = le64toh(address_of(session, ring->descriptors));
    message.addresses.available = le64toh(address_of(session, &ring->available));
    message.addresses.used = le64toh(address_of(session, &ring->used));
    if ((error = tell_ring(session->socket, SET_VRING_NUM, index, DESCRIPTORS)) == 0 &&
        (error = tell_ring(session->socket, SET_VRING_BASE, index, 0)) == 0 &&
        (error = tell(session->socket, &message, SET_VRING_ADDR, sizeof message.addresses, -1)) == 0 &&
        (error = tell_number(session->socket, SET_VRING_CALL, index, ends[1])) == 0 &&
        (error = tell_number(session->socket, SET_VRING_KICK, index, lane->kick)) == 0) {
        struct message enable = {.flags = NEED_REPLY, .ring = {index, 1}};
        error = ask(session->socket, &enable, SET_VRING_ENABLE, sizeof enable.ring);
        if (!error && (enable.size != sizeof enable.number || enable.number != 0))
            error = EPROTO;
    }
    close(ends[1]);
    return error;
}

static void end(struct vhost_session *session)
{
    if (session->socket >= 0)
        close(session->socket);
    if (session->memory && session->memory != MAP_FAILED)
        munmap(session->memory, session->length);
    free(session);
}

static void close_ends(struct vhost_lane *lane)
{
    if (lane->kick >= 0)
        close(lane->kick);
    if (lane->called >= 0)
        close(lane->called);
}

int vhost_connect(const struct sockaddr_un *address, unsigned lanes, int seconds, struct vhost_lane **first,
                  struct vhost_server *server)
{
    const size_t head = (lanes * sizeof(struct ring) + PAGE - 1) / PAGE * PAGE;
    struct vhost_session *session = calloc(1, sizeof *session + lanes * sizeof *session->lanes);
    struct timeval limit = {seconds, 0};
    int error;

    if (!session)
        return ENOMEM;
    for (unsigned index = 0; index < lanes; index++)
        session->lanes[index] = (struct vhost_lane){.session = session, .kick = -1, .called = -1};
    session->length = head + (size_t)lanes * VHOST_DATA;
    server->lanes = lanes;
    session->socket = server->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (session->socket < 0 || setsockopt(session->socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) != 0 ||
        setsockopt(session->socket, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit) != 0 ||
        connect(session->socket, (const struct sockaddr *)address, sizeof *address) != 0)
        error = errno;
    else if ((error = negotiate(session->socket, server)) == 0)
        error = share_memory(session);
    for (unsigned index = 0; !error && index < server->lanes; index++) {
        session->lanes[index].ring = (struct ring *)(void *)session->memory + index;
        session->lanes[index].data = session->memory + head + (size_t)index * VHOST_DATA;
        error = open_lane(session, index);
    }
    if (error) {
        for (unsigned index = 0; index < lanes; index++)
            close_ends(&session->lanes[index]);
        end(session);
        return error;
    }
    session->open = server->lanes;
    *first = session->lanes;
    return 0;
}

struct vhost_lane *vhost_lane(struct vhost_lane *first, unsigned number)
{
    return first + number;
}

void vhost_close(struct vhost_lane *lane)
{
    close_ends(lane);
    if (--lane->session->open == 0)
        end(lane->session);
}

bool vhost_lives(const struct vhost_lane *lane)
{
    char byte;
    /* It says nothing without being asked. */
    return recv(lane->session->socket, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && (errno == EAGAIN || errno == EINTR);
}

/* ---- Requests -------------------------------------------------------------------------------------------------- */

int vhost_exchange(struct vhost_lane *lane, enum vhost_request request, void *data, uint32_t length, uint64_t offset)
{
    const uint64_t one = 1;
    struct ring *ring = lane->ring;
    unsigned last = 0;
    uint64_t calls[8];

    ring->head.type = htole32(request);
    ring->head.priority = 0;
    ring->head.sector = htole64(request == VHOST_READ || request == VHOST_WRITE ? offset / VHOST_SECTOR : 0);
    ring->status = 0xff;
    ring->descriptors[0].address = address_of(lane->session, &ring->head);
    ring->descriptors[0].length = htole32(sizeof ring->head);
    if (request == VHOST_WRITE_ZEROES) {
        ring->range.sector = htole64(offset / VHOST_SECTOR);
        ring->range.sectors = htole32(length / VHOST_SECTOR);
        ring->range.flags = htole32(1); /* it may make a hole */
        ring->descriptors[++last].address = address_of(lane->session, &ring->range);
        ring->descriptors[last].length = htole32(sizeof ring->range);
    } else if (request != VHOST_FLUSH) {
        ring->descriptors[++last].address = address_of(lane->session, lane->data);
        ring->descriptors[last].length = htole32(length);
    }
    ring->descriptors[++last].address = address_of(lane->session, &ring->status);
    ring->descriptors[last].length = htole32(sizeof ring->status);
    for (unsigned index = 0; index <= last; index++) {
        const bool device_writes = index == last || (index == 1 && request == VHOST_READ);
        ring->descriptors[index].flags =
            htole16((uint16_t)((index < last ? HAS_NEXT : 0) | (device_writes ? DEVICE_WRITES : 0)));
        ring->descriptors[index].next = htole16((uint16_t)(index + 1));
    }
    if (request == VHOST_WRITE)
        memcpy(lane->data, data, length);
    ring->available.ring[lane->completed % DESCRIPTORS] = 0;
    __atomic_store_n(&ring->available.index, htole16((uint16_t)(lane->completed + 1)), __ATOMIC_RELEASE);
    if (write(lane->kick, &one, sizeof one) != sizeof one)
        return -1;
    do {
        ssize_t got = read(lane->called, calls, sizeof calls);
        if (got == 0 || (got < 0 && errno != EINTR))
            return -1;
    } while (le16toh(__atomic_load_n(&ring->used.index, __ATOMIC_ACQUIRE)) == lane->completed);
    lane->completed++;
    if (ring->status == 0 && request == VHOST_READ)
        memcpy(data, lane->data, length);
    return ring->status == 0 ? 0 : EIO;
}
