//! A host that forks must not copy the arenas, nor wait while the system copies what is pinned. A file of its own, so that
//! the process that forks holds nothing else.
#![cfg(target_os = "linux")]

use std::time::{Duration, Instant};

use layer_streamer::{
    Checkpoint, DType, LayerStreamer, Settings, StoredTensor, Unit,
    device::{Cpu, Device},
};
use support::limits::Holdings;

#[test]
fn a_fork_with_a_gibibyte_of_slots_takes_less_than_20_ms() {
    const UNIT: usize = 32 << 20;
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(UNIT as u64).unwrap();
    let table =
        StoredTensor { name: "zeros".into(), file: file.path().into(), offset: 0, dtype: DType::U8, shape: vec![UNIT] };
    let checkpoint = Checkpoint::from_table([table]).unwrap();
    let mut unit = Unit::new("unit");
    unit.keep("zeros", "zeros");
    let settings = Settings { n_gpu: 1, n_cpu_pinned: 31, ..Settings::default() };
    let streamer = LayerStreamer::new(&Cpu, &checkpoint, &[unit], &settings).unwrap();
    let stream = Cpu.stream().unwrap();
    streamer.next(&stream).unwrap().release().unwrap();
    // Until every slot is full and the threads sleep.
    let mut read = 0;
    while std::mem::replace(&mut read, streamer.stats().direct_bytes + streamer.stats().buffered_bytes) != read {
        std::thread::sleep(Duration::from_millis(200));
    }
    // Where nothing is registered, and so pinned, a fork that copies page tables alone is as fast.
    let (slots, spared) = (streamer.plan().memory(), Holdings::now().arenas);
    assert!(spared >= slots.iter().map(|part| part.bytes).sum::<usize>(), "{spared} bytes of {slots:?}");
    let mut times = [(); 5].map(|()| {
        let start = Instant::now();
        // SAFETY: the child calls nothing but _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: it ends the process, and touches nothing.
            unsafe { libc::_exit(0) };
        }
        let took = start.elapsed();
        assert!(child > 0, "{}", std::io::Error::last_os_error());
        // SAFETY: the process forked above; its status is not wanted.
        assert_eq!(unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) }, child);
        took
    });
    times.sort();
    println!("fork beside {}: {times:?}", streamer.stats().reader);
    assert!(times[2] < Duration::from_millis(20), "{times:?}");
}
