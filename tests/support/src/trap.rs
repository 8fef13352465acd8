//! System calls that fail on purpose: the k-th of a kind, whoever makes it. The kernel traps calls of some numbers (seccomp,
//! `SECCOMP_RET_TRAP`) of the thread that asks for it and of those that it starts; a signal handler then makes the call itself, or
//! answers with an error in its place. So nothing that is tested knows of it.

use std::{
    arch::global_asm,
    ffi::{c_int, c_void},
    mem, ptr,
    sync::atomic::{AtomicI64, AtomicUsize, Ordering::SeqCst},
};

/// A call by its number and, where not all of that number are meant, by the value of one argument: the C library makes some with
/// all signals blocked, as `madvise` when a thread ends, and those cannot be trapped.
pub type Call = (libc::c_long, Option<(u32, u32)>);

/// What fails: these calls, if it applies to them.
pub struct Kind {
    pub name: &'static str,
    pub calls: &'static [Call],
    /// By the call's arguments.
    pub applies: fn(&[usize; 6]) -> bool,
    pub errno: c_int,
}

static KINDS: AtomicUsize = AtomicUsize::new(0);
static ARMED: AtomicUsize = AtomicUsize::new(usize::MAX);
/// Calls that go through before the one that fails; below zero, how many were asked for after it.
static LEFT: AtomicI64 = AtomicI64::new(0);
/// How many fail from there on.
static COUNT: AtomicI64 = AtomicI64::new(0);

unsafe extern "C" {
    fn trap_call(number: usize, arguments: *const usize) -> isize;
    fn trap_back();
}

// A system call at an address that the filter knows, after which `trap_back` is the next instruction.
global_asm!(
    ".globl trap_call",
    ".globl trap_back",
    "trap_call:",
    "mov rax, rdi",
    "mov r11, rsi",
    "mov rdi, [r11]",
    "mov rsi, [r11 + 8]",
    "mov rdx, [r11 + 16]",
    "mov r10, [r11 + 24]",
    "mov r8, [r11 + 32]",
    "mov r9, [r11 + 40]",
    "syscall",
    "trap_back:",
    "ret",
);

fn fails(number: libc::c_long, arguments: &[usize; 6]) -> Option<c_int> {
    let kinds = KINDS.load(SeqCst) as *const &'static [Kind];
    // SAFETY: `install` put it there, and it stays.
    let kind = unsafe { kinds.as_ref() }?.get(ARMED.load(SeqCst))?;
    let is = |(other, only): &Call| {
        *other == number && only.is_none_or(|(index, value)| arguments[index as usize] as u32 == value)
    };
    let counts = kind.calls.iter().any(is) && (kind.applies)(arguments);
    let left = counts.then(|| LEFT.fetch_sub(1, SeqCst))?;
    (left <= 0 && left > -COUNT.load(SeqCst)).then_some(kind.errno)
}

extern "C" fn trapped(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a context, in which the registers are those of the call; its answer goes to RAX.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let of = |register: c_int| registers[register as usize] as usize;
        let number = of(libc::REG_RAX);
        let arguments =
            [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX, libc::REG_R10, libc::REG_R8, libc::REG_R9].map(of);
        let answer = match fails(number as libc::c_long, &arguments) {
            Some(errno) => -(errno as isize),
            None => trap_call(number, arguments.as_ptr()),
        };
        registers[libc::REG_RAX as usize] = answer as i64;
    }
}

/// From now on this thread and those that it starts make calls of these kinds by way of the handler.
pub fn install(kinds: &'static &'static [Kind]) {
    KINDS.store(ptr::from_ref(kinds) as usize, SeqCst);
    let op = |code: u32, k: u32, (jt, jf): (u8, u8)| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = |at: u32| op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at, (0, 0));
    let equal = |k: u32, jumps| op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, k, jumps);
    let answer = |k: u32| op(libc::BPF_RET | libc::BPF_K, k, (0, 0));
    let back = trap_back as *const () as usize;
    // The address of the instruction after the call, in two halves.
    let mut program = vec![load(8), equal(back as u32, (0, 3)), load(12), equal((back >> 32) as u32, (0, 1))];
    program.extend([answer(libc::SECCOMP_RET_ALLOW), load(0)]);
    let mut calls: Vec<_> = kinds.iter().flat_map(|kind| kind.calls).collect();
    calls.sort();
    calls.dedup();
    for (number, only) in calls {
        match only {
            None => program.extend([equal(*number as u32, (0, 1)), answer(libc::SECCOMP_RET_TRAP)]),
            Some((index, value)) => program.extend([
                equal(*number as u32, (0, 4)),
                load(16 + 8 * index),
                equal(*value, (0, 1)),
                answer(libc::SECCOMP_RET_TRAP),
                load(0),
            ]),
        }
    }
    program.push(answer(libc::SECCOMP_RET_ALLOW));
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the structures are what the calls take; the filter is `len` instructions long, and the kernel copies it. The
    // handler makes system calls and touches atomics, and nothing else.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = trapped as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()), 0);
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const filter), 0);
    }
}

/// Calls of kind number `kind` fail from the `k`-th on, counted from 0, `count` of them.
pub fn arm(kind: usize, k: usize, count: usize) {
    LEFT.store(k as i64, SeqCst);
    COUNT.store(count as i64, SeqCst);
    ARMED.store(kind, SeqCst);
}

/// No more calls fail. Whether one did.
pub fn disarm() -> bool {
    ARMED.store(usize::MAX, SeqCst);
    LEFT.load(SeqCst) < 0
}
