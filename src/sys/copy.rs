//! Reading and writing memory whose file somebody else may cut short, whose page may have gone bad, or for
//! which there may be none: copying out of it and into it, and finding out whether it is zero.
//!
//! Touching such memory is a SIGBUS. The few instructions that touch it stand together, and the handler
//! that is installed here lets a thread that faulted in them go on behind them, where they say that they
//! failed. No page is mapped in place of the one that is missing, and every other SIGBUS goes where it
//! went before.
#![allow(unsafe_code)] // An instruction that may fault, and the handler for it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::msg::{IovBuf, readv};
use crate::region::{Span, SpanMut};

/// Copies `span` to the start of `buffer`, which is at least as long. `false`: not all of the memory
/// could be read, and what `buffer` holds is of no use. The caller finds out why by a system call.
///
/// Others may write the memory meanwhile; the copy is then torn. A hole of the file becomes
/// allocated by this, as by any touch of a mapping.
#[must_use]
pub fn copy(span: &Span<'_>, buffer: &mut [u8]) -> bool {
    assert!(span.len() <= buffer.len(), "the copy fits");
    if !is_ready() {
        return false;
    }
    // SAFETY: `buffer` is borrowed exclusively and long enough. The span's owner keeps its addresses
    // mapped while it is borrowed; whether there is memory behind them is what the handler is for. The
    // bytes are read by machine instructions and never seen as a Rust reference.
    unsafe { machine::copy(buffer.as_mut_ptr(), span.base(), span.len()) == 0 }
}

/// Copies `bytes` to the start of `span`, which is at least as long. Memory that cannot be had is the error
/// `EFAULT`; some of it may be written then.
pub fn place(bytes: &[u8], span: SpanMut<'_>) -> io::Result<()> {
    assert!(bytes.len() <= span.len(), "the copy fits");
    // SAFETY: `bytes` is borrowed, and `span` gives addresses that stay mapped for writing while it is; whether
    // there is memory behind them is what the handler is for. No reference to that memory exists.
    let placed =
        is_ready() && unsafe { machine::copy(span.base(), bytes.as_ptr(), bytes.len()) == 0 };
    match placed {
        true => Ok(()),
        false => place_by_kernel(bytes, span),
    }
}

/// The same, by the kernel: it says why it cannot. hugetlbfs has no write, but can be read into.
fn place_by_kernel(bytes: &[u8], span: SpanMut<'_>) -> io::Result<()> {
    let copy = File::from(memfd_create(c"memferry-copy", MFdFlags::MFD_CLOEXEC)?);
    copy.write_all_at(bytes, 0)?;
    let (mut rest, mut span, mut iov) = (bytes.len(), [span], IovBuf::new());
    while rest > 0 {
        match readv(copy.as_fd(), &iov.scatter(&span)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                span[0].advance(read);
                rest -= read;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether all bytes of `span` are zero; `None` if not all that had to be looked at could be read. Stops
/// at the first bytes that are not, so a page that holds something mostly costs one cache line.
///
/// Others may write the memory meanwhile. A hole of the file becomes allocated by this.
#[must_use]
pub fn is_zero(span: &Span<'_>) -> Option<bool> {
    if !is_ready() {
        return None;
    }
    // SAFETY: as above, and nothing is written.
    match unsafe { machine::test(span.base(), span.len()) } {
        0 => Some(true),
        1 => Some(false),
        _ => None,
    }
}

/// Whether a fault of these would be caught; installs the handler at first use.
fn is_ready() -> bool {
    static READY: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *READY.get_or_init(|| machine::catch_faults().is_ok())
}

#[cfg(target_arch = "x86_64")]
mod machine {
    use super::io;
    use std::ffi::{c_int, c_void};
    use std::sync::OnceLock;

    use nix::errno::Errno;

    // 64 bytes at a time, by the vector registers every such machine has: `rep movsb` is as fast on most
    // of them, and twenty times slower where a hypervisor has its fast strings off.
    core::arch::global_asm!(
        ".pushsection .text.memferry_copy,\"ax\",@progbits",
        ".hidden memferry_copy",
        ".hidden memferry_copy_fails",
        ".globl memferry_copy",
        ".globl memferry_copy_fails",
        ".type memferry_copy,@function",
        ".hidden memferry_test",
        ".globl memferry_test",
        ".type memferry_test,@function",
        // System V: rdi is where to, rsi where from, rdx how much; eax is 0, or 2 if it failed. No stack
        // is used here and below, so that the handler can leave from anywhere.
        "memferry_copy:",
        "mov rcx, rdx",
        "shr rcx, 6",
        "jz 3f",
        "2:",
        "movdqu xmm0, [rsi]",
        "movdqu xmm1, [rsi + 16]",
        "movdqu xmm2, [rsi + 32]",
        "movdqu xmm3, [rsi + 48]",
        "movdqu [rdi], xmm0",
        "movdqu [rdi + 16], xmm1",
        "movdqu [rdi + 32], xmm2",
        "movdqu [rdi + 48], xmm3",
        "add rsi, 64",
        "add rdi, 64",
        "dec rcx",
        "jnz 2b",
        "3:",
        "and edx, 63",
        "jz 5f",
        "4:",
        "mov al, [rsi]",
        "mov [rdi], al",
        "inc rsi",
        "inc rdi",
        "dec edx",
        "jnz 4b",
        "5:",
        "xor eax, eax",
        "ret",
        ".size memferry_copy, . - memferry_copy",
        // rdi is where, rsi how much; eax is 0 if all is zero, 1 if not, 2 if it failed.
        "memferry_test:",
        "pxor xmm4, xmm4",
        "mov rcx, rsi",
        "shr rcx, 6",
        "jz 3f",
        "2:",
        "movdqu xmm0, [rdi]",
        "movdqu xmm1, [rdi + 16]",
        "movdqu xmm2, [rdi + 32]",
        "movdqu xmm3, [rdi + 48]",
        "por xmm0, xmm1",
        "por xmm2, xmm3",
        "por xmm0, xmm2",
        "pcmpeqb xmm0, xmm4",
        "pmovmskb eax, xmm0",
        "cmp eax, 0xffff",
        "jne 6f",
        "add rdi, 64",
        "dec rcx",
        "jnz 2b",
        "3:",
        "and esi, 63",
        "jz 5f",
        "4:",
        "cmp byte ptr [rdi], 0",
        "jne 6f",
        "inc rdi",
        "dec esi",
        "jnz 4b",
        "5:",
        "xor eax, eax",
        "ret",
        "6:",
        "mov eax, 1",
        "ret",
        "memferry_copy_fails:",
        "mov eax, 2",
        "ret",
        ".size memferry_test, . - memferry_test",
        ".popsection",
    );

    unsafe extern "sysv64" {
        #[link_name = "memferry_copy"]
        pub(super) fn copy(to: *mut u8, from: *const u8, bytes: usize) -> u32;
        #[link_name = "memferry_test"]
        pub(super) fn test(from: *const u8, bytes: usize) -> u32;
        static memferry_copy_fails: u8;
    }

    /// What a SIGBUS did before us.
    static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

    pub(super) fn catch_faults() -> io::Result<()> {
        // SAFETY: all zero is a valid `sigaction`: the default action with an empty mask.
        let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: a null new action only asks for the present one, which is written to `before`.
        Errno::result(unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut before) })?;
        BEFORE.get_or_init(|| before);
        // SAFETY: as above.
        let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
        ours.sa_sigaction = on_bus_error as *const () as usize;
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // SAFETY: `on_bus_error` has the signature that SA_SIGINFO asks for and makes only calls that
        // are allowed in a handler.
        Errno::result(unsafe {
            libc::sigaction(libc::SIGBUS, &raw const ours, std::ptr::null_mut())
        })?;
        Ok(())
    }

    extern "C" fn on_bus_error(_signal: c_int, _info: *mut libc::siginfo_t, context: *mut c_void) {
        // SAFETY: the kernel passes the interrupted thread's context, which is ours to change.
        let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
        let at = &mut context.uc_mcontext.gregs[libc::REG_RIP as usize];
        let address = |symbol: *const u8| symbol.addr().cast_signed() as libc::greg_t;
        let fails = address(&raw const memferry_copy_fails);
        if (address(copy as *const u8)..fails).contains(at) {
            *at = fails;
            return;
        }
        // Not ours: put back what was there. The fault happens again and goes to it.
        if let Some(before) = BEFORE.get() {
            // SAFETY: `before` is what the kernel gave us.
            unsafe { libc::sigaction(libc::SIGBUS, before, std::ptr::null_mut()) };
        }
    }
}

/// Elsewhere nothing is copied this way: callers read the file, and the kernel places.
#[cfg(not(target_arch = "x86_64"))]
mod machine {
    use super::io;

    pub(super) unsafe fn copy(_to: *mut u8, _from: *const u8, _bytes: usize) -> u32 {
        2
    }

    pub(super) unsafe fn test(_from: *const u8, _bytes: usize) -> u32 {
        2
    }

    pub(super) fn catch_faults() -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::region::{Access, Mapping};

    #[test]
    fn memory_that_was_cut_off_ends_the_copy_and_not_the_process() {
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        file.write_all_at(&[7; 3 * 4096], 0).unwrap();
        let mapping = Mapping::new(&file, 3 * 4096, Access::Read).unwrap();
        let mut buffer = [0; 3 * 4096];
        let span = mapping.span(1, 3 * 4096 - 1).unwrap();
        assert!(copy(&span, &mut buffer));
        assert_eq!(buffer[..3 * 4096 - 1], [7; 3 * 4096 - 1]);
        file.set_len(4096).unwrap();
        assert!(!copy(&span, &mut buffer));
        assert!(copy(&mapping.span(0, 4096).unwrap(), &mut buffer));
        assert_eq!(is_zero(&mapping.span(4096, 4096).unwrap()), None);
        assert_eq!(is_zero(&mapping.span(0, 4096).unwrap()), Some(false));
        file.set_len(3 * 4096).unwrap();
        assert!(copy(&span, &mut buffer), "nothing was put in its place");
        assert!(buffer[4095..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn placing_where_no_memory_is_is_an_error_and_no_signal() {
        for place in [place, place_by_kernel] {
            let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
            file.set_len(3 * 4096).unwrap();
            let mapping = Mapping::new(&file, 3 * 4096, Access::Write).unwrap();
            let span = |offset, len| mapping.span_mut(offset, len).unwrap();
            place(&[7; 5000], span(100, 6000)).unwrap();
            let mut found = [1; 6000];
            file.read_exact_at(&mut found, 100).unwrap();
            assert_eq!(
                (&found[..5000], &found[5000..]),
                (&[7; 5000][..], &[0; 1000][..])
            );
            file.set_len(4096).unwrap();
            let error = place(&[7; 5000], span(0, 5000)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(nix::libc::EFAULT));
            place(&[8; 4096], span(0, 4096)).unwrap();
        }
    }

    #[test]
    fn a_single_bit_anywhere_is_not_zero() {
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(2 * 4096).unwrap();
        let mapping = Mapping::new(&file, 2 * 4096, Access::Read).unwrap();
        for (offset, length) in [(0, 4096), (64, 1), (3, 63), (1, 64), (5, 4000)] {
            let zero = || is_zero(&mapping.span(offset, length).unwrap()).unwrap();
            for at in [0, length / 2, length - 1] {
                let set = |bit| file.write_all_at(&[bit], (offset + at) as u64).unwrap();
                assert!(zero(), "{length} bytes at {offset}");
                set(1 << (at % 8));
                assert!(!zero(), "byte {at} of {length} at {offset}");
                set(0);
            }
            // What stands beside it is not looked at.
            file.write_all_at(&[1], (offset + length) as u64).unwrap();
            assert!(zero());
            file.write_all_at(&[0], (offset + length) as u64).unwrap();
        }
        assert_eq!(is_zero(&mapping.span(9, 0).unwrap()), Some(true));
    }
}
