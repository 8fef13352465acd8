//! Blocks of quantised weights, held against what the Python package `gguf` makes of them: `data/make_blocks.py`.

mod common;

use common::{BLOCKS, check_blocks, unit_of_blocks};
use layer_streamer::{
    Checkpoint, DType, LayerStreamer, Settings, StoredTensor,
    device::Cpu,
    plan::{DEVICE_ALIGN, Purpose, Tier},
};
use support::data;

#[test]
fn blocks_of_every_type_become_what_gguf_makes_of_them_to_the_bit_in_every_tier() {
    check_blocks(&Cpu);
}

#[test]
fn blocks_are_kept_on_the_device_as_they_are_stored() {
    let checkpoint = Checkpoint::open(data("blocks.gguf")).unwrap();
    let kept = |tier: Tier| {
        let mut unit = unit_of_blocks(DType::BF16);
        unit.set_tier(tier);
        let streamer = LayerStreamer::new(&Cpu, &checkpoint, &[unit], &Settings::default()).unwrap();
        let parts = streamer.plan().memory();
        let kept = parts.iter().filter(|part| matches!(part.purpose, Purpose::Kept { .. }));
        kept.map(|part| part.bytes).sum::<usize>()
    };
    let stored: usize = BLOCKS.iter().map(|dtype| dtype.bytes(5120).next_multiple_of(DEVICE_ALIGN)).sum();
    // A device that computes in RAM has whole pages.
    assert_eq!(kept(Tier::GpuPacked), stored.next_multiple_of(4096));
    assert_eq!(kept(Tier::Gpu), (BLOCKS.len() * 2 * 5120_usize.next_multiple_of(DEVICE_ALIGN)).next_multiple_of(4096));
}

#[test]
fn rows_that_are_no_whole_blocks_are_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    for (dtype, shape) in [(DType::Q8_0, vec![4, 48]), (DType::Q4_K, vec![2, 128]), (DType::Q4_K, vec![])] {
        let tensor = StoredTensor { name: "t".into(), file: file.path().into(), offset: 0, dtype, shape };
        let error = Checkpoint::from_table([tensor]).unwrap_err().to_string();
        assert!(error.contains("tensor t") && error.contains("rows that are no whole blocks"), "{error}");
    }
}
