//! The device's own time of copies and layers, for observers that ask for it: two timed events around each, from a pool that
//! is made at the start. Nobody waits for them: they are polled later.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::{
    device::Device,
    error::Result,
    trace::{Activity, Span, Stage, Trace},
};

/// Times since the base are told to about 2⁻²⁴ of themselves: after this long another event becomes the base.
const NEW_BASE: Duration = Duration::from_secs(10);

/// The clock is compared with the host's this often, and the closest comparison counts.
const COMPARISONS: usize = 5;

/// Work that has begun on the device: the pair of events around it.
pub(crate) struct Timing<D: Device>([D::Event; 2]);

/// Work whose end was recorded, and may not have been reached.
struct UnderWay<D: Device> {
    events: [D::Event; 2],
    activity: Activity,
    bytes: usize,
}

/// Times the work of one stage, which one thread at a time enqueues.
pub(crate) struct DeviceTimer<D: Device> {
    device: D,
    stage: Stage,
    base: D::Event,
    /// When the base was reached, by the host's clock.
    reached: Instant,
    idle: Vec<[D::Event; 2]>,
    under_way: VecDeque<UnderWay<D>>,
}

impl<D: Device> DeviceTimer<D> {
    /// A timer for up to `most` pieces of work under way at once; `None` if the device tells no time of its own.
    pub(crate) fn new(device: &D, stage: Stage, most: usize) -> Result<Option<Self>> {
        let stream = device.named_stream(c"layer-streamer clock")?;
        let mut closest: Option<(Duration, D::Event, Instant)> = None;
        for _ in 0..COMPARISONS {
            let Some(event) = device.timed_event()? else { return Ok(None) };
            let before = Instant::now();
            device.record(&event, &stream)?;
            while !device.query(&event)? {
                std::hint::spin_loop();
            }
            let took = before.elapsed();
            if closest.as_ref().is_none_or(|(least, ..)| took < *least) {
                closest = Some((took, event, before + took / 2));
            }
        }
        let (_, base, reached) = closest.expect("there are comparisons");
        let pair = |_| Ok([timed(device)?, timed(device)?]);
        let idle = (0..most).map(pair).collect::<Result<_>>()?;
        let under_way = VecDeque::with_capacity(most);
        Ok(Some(Self { device: device.clone(), stage, base, reached, idle, under_way }))
    }

    /// The work enqueued on `stream` from now on is to be timed; `None`, of which observers are told, where too much is under way.
    pub(crate) fn begin(&mut self, stream: &D::Stream, trace: &Trace) -> Result<Option<Timing<D>>> {
        let Some(events) = self.idle.pop() else {
            trace.untimed(self.stage);
            return Ok(None);
        };
        self.device.record(&events[0], stream)?;
        Ok(Some(Timing(events)))
    }

    /// The work ends with what is on `stream` now.
    pub(crate) fn end(
        &mut self,
        Timing(events): Timing<D>,
        stream: &D::Stream,
        activity: Activity,
        bytes: usize,
    ) -> Result<()> {
        self.device.record(&events[1], stream)?;
        self.under_way.push_back(UnderWay { events, activity, bytes });
        Ok(())
    }

    /// Tells of the work that is done by now, in the order in which its ends were recorded.
    pub(crate) fn tell(&mut self, trace: &Trace) -> Result<()> {
        while let Some(UnderWay { events: [begin, end], .. }) = self.under_way.front() {
            if !self.device.query(end)? {
                break;
            }
            // From the end back: the work may have begun before the base was reached, on another stream.
            let took = self.device.elapsed(begin, end)?;
            let end = self.reached + self.device.elapsed(&self.base, end)?;
            let start = end.checked_sub(took).unwrap_or(end);
            let UnderWay { mut events, activity, bytes } = self.under_way.pop_front().expect("it is there");
            trace.on_device(&Span { stage: self.stage, activity, bytes, start, end });
            if end.saturating_duration_since(self.reached) > NEW_BASE {
                std::mem::swap(&mut self.base, &mut events[1]);
                self.reached = end;
            }
            self.idle.push(events);
        }
        Ok(())
    }
}

fn timed<D: Device>(device: &D) -> Result<D::Event> {
    Ok(device.timed_event()?.expect("the device told its time a moment ago"))
}
