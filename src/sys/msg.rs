//! `sendmsg` and `recvmsg` over raw spans, and the socket error queue.
