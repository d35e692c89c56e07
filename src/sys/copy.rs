//! Reading and writing memory whose file somebody else may cut short, whose page may have gone bad, or for
//! which there may be none: copying out of it and into it, finding out whether it is zero, and its checksum.
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

/// The CRC-32C of `span` where it is, without the copy that a checksum of a slice would need: the memory may be
/// written by others meanwhile, and the sum is then one of torn bytes. `None`: not all of it could be read, or
/// this processor has no instructions for it.
///
/// A hole of the file becomes allocated by this.
#[must_use]
pub fn crc32c(span: &Span<'_>) -> Option<u32> {
    if !is_ready() || !machine::has_crc32c() {
        return None;
    }
    let mut sum = 0;
    // SAFETY: as above; the result is written to a local variable. The instructions were asked for.
    match unsafe { machine::crc32c(span.base(), span.len(), &raw mut sum, LANE_SHIFTS) } {
        0 => Some(sum),
        _ => None,
    }
}

/// Length of one of the three lanes in which a checksum is made, in bytes: three of them are a page but 16 bytes.
const LANE_BYTES: u64 = 1360;

/// What moves a checksum over two lanes, and over one, of zeros: x to the power of the bits moved over less 33, of
/// which 32 come back with the instruction that divides, and 1 with the reflected product.
const LANE_SHIFTS: [u64; 2] = [power(8 * 2 * LANE_BYTES - 33), power(8 * LANE_BYTES - 33)];

/// x to the power `n` modulo the polynomial of CRC-32C, the coefficient of x^31 in the lowest bit.
const fn power(n: u64) -> u64 {
    /// Castagnoli's, reflected.
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let mut power: u32 = 1 << 31;
    let mut at = 0;
    while at < n {
        let carry = power & 1;
        power >>= 1;
        if carry == 1 {
            power ^= POLYNOMIAL;
        }
        at += 1;
    }
    power as u64
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
        ".hidden memferry_crc32c",
        ".globl memferry_crc32c",
        ".type memferry_crc32c,@function",
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
        ".size memferry_test, . - memferry_test",
        // rdi is where, rsi how much, rdx where the sum goes, rcx and r8 the shifts; eax is 0, or 2 if it failed.
        // The instruction takes three cycles and another can begin in each: so three sums are made side by side.
        "memferry_crc32c:",
        "mov eax, 0xffffffff",
        "movq xmm2, rcx",
        "movq xmm3, r8",
        "2:",
        "cmp rsi, 3 * 1360",
        "jb 4f",
        "xor r9d, r9d",
        "xor r10d, r10d",
        "mov r11d, 1360 / 8",
        // What is two rounds away is fetched, or memory would take twice as long as the sums (1 GiB that is in
        // no cache: 160 ms without this, 80 with it, 50 out of the cache). A prefetch never faults.
        "lea rcx, [rdi + 2 * 3 * 1360]",
        "3:",
        "prefetcht0 [rcx]",
        "add rcx, 24",
        "crc32 rax, qword ptr [rdi]",
        "crc32 r9, qword ptr [rdi + 1360]",
        "crc32 r10, qword ptr [rdi + 2 * 1360]",
        "add rdi, 8",
        "dec r11d",
        "jnz 3b",
        "movq xmm0, rax",
        "movq xmm1, r9",
        "pclmulqdq xmm0, xmm2, 0",
        "pclmulqdq xmm1, xmm3, 0",
        "pxor xmm0, xmm1",
        "movq rcx, xmm0",
        "xor eax, eax",
        "crc32 rax, rcx",
        "xor rax, r10",
        "add rdi, 2 * 1360",
        "sub rsi, 3 * 1360",
        "jmp 2b",
        "4:",
        "mov r11, rsi",
        "shr r11, 3",
        "jz 6f",
        "5:",
        "crc32 rax, qword ptr [rdi]",
        "add rdi, 8",
        "dec r11",
        "jnz 5b",
        "6:",
        "and esi, 7",
        "jz 8f",
        "7:",
        "crc32 eax, byte ptr [rdi]",
        "inc rdi",
        "dec esi",
        "jnz 7b",
        "8:",
        "not eax",
        "mov [rdx], eax",
        "xor eax, eax",
        "ret",
        "memferry_copy_fails:",
        "mov eax, 2",
        "ret",
        ".size memferry_crc32c, . - memferry_crc32c",
        ".popsection",
    );

    unsafe extern "sysv64" {
        #[link_name = "memferry_copy"]
        pub(super) fn copy(to: *mut u8, from: *const u8, bytes: usize) -> u32;
        #[link_name = "memferry_test"]
        pub(super) fn test(from: *const u8, bytes: usize) -> u32;
        #[link_name = "memferry_crc32c"]
        fn sum(from: *const u8, bytes: usize, to: *mut u32, two_lanes: u64, one: u64) -> u32;
        static memferry_copy_fails: u8;
    }

    // The instructions above have it as a number.
    const _: () = assert!(super::LANE_BYTES == 1360);

    /// Whether [`crc32c`] can be called.
    pub(super) fn has_crc32c() -> bool {
        is_x86_feature_detected!("sse4.2") && is_x86_feature_detected!("pclmulqdq")
    }

    /// As [`copy`]; `to` is where the sum goes.
    pub(super) unsafe fn crc32c(
        from: *const u8,
        bytes: usize,
        to: *mut u32,
        [two, one]: [u64; 2],
    ) -> u32 {
        // SAFETY: as the caller promises for `from` and `to`.
        unsafe { sum(from, bytes, to, two, one) }
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

    pub(super) fn has_crc32c() -> bool {
        false
    }

    pub(super) unsafe fn crc32c(
        _from: *const u8,
        _bytes: usize,
        _to: *mut u32,
        _shifts: [u64; 2],
    ) -> u32 {
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
    fn a_checksum_in_place_is_that_of_the_bytes() {
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        let mut state = 1_u64;
        let mut random = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        };
        let bytes: Vec<u8> = std::iter::repeat_with(&mut random)
            .take(20 * 4096)
            .collect();
        file.write_all_at(&bytes, 0).unwrap();
        let mapping = Mapping::new(&file, bytes.len(), Access::Read).unwrap();
        let lane = usize::try_from(LANE_BYTES).unwrap();
        let lengths = [
            0,
            1,
            7,
            8,
            9,
            lane,
            3 * lane - 1,
            3 * lane,
            3 * lane + 1,
            4096,
            9 * lane + 13,
            65536,
        ];
        for length in lengths {
            for offset in [0, 1, 5, 4096] {
                let span = mapping.span(offset, length).unwrap();
                let expected = crate::wire::crc32c(&bytes[offset..offset + length]);
                assert_eq!(crc32c(&span), Some(expected), "{length} bytes at {offset}");
            }
        }
        file.set_len(4096).unwrap();
        assert_eq!(crc32c(&mapping.span(0, 65536).unwrap()), None, "no memory");
        assert!(crc32c(&mapping.span(0, 4096).unwrap()).is_some());
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
