#include "cpu/contact_sheet.h"

#include "checks.h"

namespace optmem {
namespace {

// That an axis of `size` positions lies inside the coefficients, and reads no more than size_in pixels.
void check_axis(const ContactSheet& job, int64_t at, int64_t taps, int64_t size, int64_t size_in, int64_t num_coefficients) {
  check(at >= 0 && taps > 0 && at + size * (2 + taps) <= num_coefficients, "contact_sheet: an axis lies outside the coefficients");
  for (int64_t position = 0; position < size; ++position) {
    const SheetTaps found = sheet_taps(job.coefficients + at, size, taps, position);
    check(found.first >= 0 && found.count >= 0 && found.count <= taps && found.first + int64_t{found.count} <= size_in,
          "contact_sheet: position ", position, " reads outside its page");
  }
}

void check_page(const ContactSheet& job, const SheetPage& page, int64_t num_bytes, int64_t num_coefficients) {
  check(page.channels == job.channels || page.channels == 1, "contact_sheet: a page of ", page.channels, " channels");
  check(page.height_in > 0 && page.width_in > 0 && page.height_in <= kResampleMaxSide && page.width_in <= kResampleMaxSide,
        "contact_sheet: a page of ", page.height_in, "x", page.width_in, " pixels");
  check(page.pixels >= 0 && page.pixels + page.height_in * page.width_in * page.channels <= num_bytes,
        "contact_sheet: a page lies outside the pixels");
  check(page.top >= 0 && page.left >= 0 && page.height > 0 && page.width > 0 && page.top + page.height <= job.size &&
            page.left + page.width <= job.size,
        "contact_sheet: a box lies outside the sheet");
  check_axis(job, page.down, page.down_taps, page.height, page.height_in, num_coefficients);
  check_axis(job, page.across, page.across_taps, page.width, page.width_in, num_coefficients);
}

}  // namespace

void contact_sheet_scalar(const ContactSheet& job, int64_t num_bytes, int64_t num_coefficients) {
  for (int64_t number = 0; number < job.num_pages; ++number) {
    const SheetPage& page = job.pages[number];
    check_page(job, page, num_bytes, num_coefficients);
    for (int64_t index = 0; index < sheet_values(page); ++index) sheet_value(job, page, static_cast<uint32_t>(index));
  }
}

}  // namespace optmem
