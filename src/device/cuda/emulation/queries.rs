//! What the runtime says about the machine, and the names of errors.

use std::{
    ffi::{CStr, c_char, c_int},
    sync::atomic::Ordering::Relaxed,
};

use super::{
    CURRENT, Code, MACHINE, code, current,
    sys::{self, cudaDeviceAttr as Attribute},
};

/// How many devices programs see.
fn devices() -> Result<c_int, Code> {
    if MACHINE.driver.load(Relaxed) < sys::CUDART_VERSION {
        return Err(Code::cudaErrorInsufficientDriver);
    }
    match MACHINE.devices.load(Relaxed) {
        0 => Err(Code::cudaErrorNoDevice),
        devices => Ok(devices),
    }
}

fn check(ordinal: c_int) -> Result<(), Code> {
    if (0..devices()?).contains(&ordinal) { Ok(()) } else { Err(Code::cudaErrorInvalidDevice) }
}

fn attribute(attribute: Attribute) -> Result<c_int, Code> {
    let capability = MACHINE.capability.load(Relaxed);
    match attribute {
        Attribute::cudaDevAttrComputeCapabilityMajor => Ok(capability / 10),
        Attribute::cudaDevAttrComputeCapabilityMinor => Ok(capability % 10),
        Attribute::cudaDevAttrMultiProcessorCount => Ok(4),
        _ => Err(Code::cudaErrorInvalidValue),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaGetDeviceCount(to: *mut c_int) -> Code {
    // SAFETY: a program gives the place for the number.
    code(devices().map(|devices| unsafe { to.write(devices) }))
}

#[unsafe(no_mangle)]
extern "C" fn cudaSetDevice(ordinal: c_int) -> Code {
    code(check(ordinal).and_then(|()| {
        CURRENT.set(ordinal as usize);
        current().alive()
    }))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaDeviceGetAttribute(to: *mut c_int, which: Attribute, ordinal: c_int) -> Code {
    // SAFETY: a program gives the place for the value.
    code(check(ordinal).and_then(|()| attribute(which)).map(|value| unsafe { to.write(value) }))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaGetDeviceProperties(to: *mut sys::cudaDeviceProp, ordinal: c_int) -> Code {
    code(check(ordinal).map(|()| {
        // SAFETY: a program gives the place for the structure, which is one of numbers: zeros will do.
        let properties = unsafe {
            to.write_bytes(0, 1);
            &mut *to
        };
        let name = c"emulated GPU".to_bytes();
        properties.name.iter_mut().zip(name).for_each(|(to, byte)| *to = *byte as c_char);
    }))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaDriverGetVersion(to: *mut c_int) -> Code {
    // SAFETY: a program gives the place for the version.
    unsafe { to.write(MACHINE.driver.load(Relaxed)) };
    Code::cudaSuccess
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaRuntimeGetVersion(to: *mut c_int) -> Code {
    // SAFETY: a program gives the place for the version.
    unsafe { to.write(sys::CUDART_VERSION) };
    Code::cudaSuccess
}

/// Names and descriptions of the errors that the emulation returns.
macro_rules! errors {
    ($($name:ident: $text:literal,)*) => {
        fn describe(error: Code) -> Option<(&'static CStr, &'static CStr)> {
            let named = |name: &'static str, text| Some((CStr::from_bytes_with_nul(name.as_bytes()).ok()?, text));
            match error {
                $(Code::$name => named(concat!(stringify!($name), "\0"), $text),)*
                _ => None,
            }
        }
    };
}
errors! {
    cudaSuccess: c"no error",
    cudaErrorInvalidValue: c"invalid argument",
    cudaErrorMemoryAllocation: c"out of memory",
    cudaErrorInvalidConfiguration: c"invalid configuration argument",
    cudaErrorInsufficientDriver: c"driver version is insufficient for the runtime version",
    cudaErrorNoDevice: c"no device is there",
    cudaErrorInvalidDevice: c"invalid device ordinal",
    cudaErrorOperatingSystem: c"a call of the operating system failed",
    cudaErrorInvalidResourceHandle: c"invalid resource handle",
    cudaErrorNotReady: c"not ready",
    cudaErrorIllegalAddress: c"an illegal memory access was encountered",
    cudaErrorLaunchOutOfResources: c"too many resources requested for a launch",
    cudaErrorHostMemoryAlreadyRegistered: c"part or all of the memory is registered already",
    cudaErrorHostMemoryNotRegistered: c"the memory is not registered",
    cudaErrorLaunchFailure: c"unspecified launch failure",
    cudaErrorUnknown: c"unknown error",
}

#[unsafe(no_mangle)]
extern "C" fn cudaGetErrorName(error: Code) -> *const c_char {
    describe(error).map_or(c"cudaErrorWithoutName", |(name, _)| name).as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn cudaGetErrorString(error: Code) -> *const c_char {
    describe(error).map_or(c"an error that the emulation does not know", |(_, text)| text).as_ptr()
}
